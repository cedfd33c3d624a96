"Every loss gives its authors' value and gradient."
import golden
import pytest
import torch

known,arrays = golden.load()
entries,extras = [e for e in known if e['method'] in golden.LOSSES],[e for e in known if e['method'] in golden.EXTRAS]
assert {e['method'] for e in entries}==set(golden.LOSSES), 'a loss without a golden case'

def run(e, dtype):
    tensors = {k: torch.tensor(arrays[v]) for k,v in {**e['inputs'], **e['params']}.items()}
    tensors = {k: t.to(dtype) if t.is_floating_point() else t for k,t in tensors.items()}
    for g in e['grads']: tensors[g].requires_grad_()
    loss = golden.LOSSES[e['method']](tensors, e['hyperparameters'])
    assert loss.ndim==0
    loss.backward()
    return loss.item(),{g: tensors[g].grad.double() for g in e['grads']},tensors

@pytest.mark.parametrize('e', entries, ids=lambda e: e['id'])
def test_equals_the_authors_in_float64(e):
    loss,grads,_ = run(e, torch.float64)
    assert abs(loss-e['expected_loss'])<=1e-6*abs(e['expected_loss'])+1e-10
    if e['check']!='loss+grad': return
    for g,key in e['grads'].items():
        expected = torch.tensor(arrays[key]).double()
        assert (grads[g]-expected).abs().max()<=1e-5*expected.abs().max()+1e-10

@pytest.mark.parametrize('e', entries, ids=lambda e: e['id'])
def test_float32_is_as_near_as_float32_can_be(e):
    loss,grads,_ = run(e, torch.float32)
    peer = e.get('peer_float32') or {}
    def bound(floor, name): return max(floor, 20*peer[name]) if isinstance(peer.get(name), float) else floor   # else the peer's is not finite
    assert abs(loss-e['expected_loss'])<=bound(1e-5, 'rel_err_loss')*abs(e['expected_loss'])+(1e-5 if 'zero-loss' in e['tags'] else 1e-10)
    for g,key in e['grads'].items():
        expected = torch.tensor(arrays[key]).double()
        assert (grads[g]-expected).abs().max()<=bound(1e-4, 'rel_err_grad')*expected.abs().max()+(1e-5 if 'zero-loss' in e['tags'] else 1e-10)

@pytest.mark.parametrize('e', entries, ids=lambda e: e['id'])
def test_gradients_never_reach_the_teacher(e):
    tensors = {k: torch.tensor(arrays[v]) for k,v in {**e['inputs'], **e['params']}.items()}
    for t in tensors.values():
        if t.is_floating_point(): t.requires_grad_()
    golden.LOSSES[e['method']](tensors, e['hyperparameters']).backward()
    assert all(t.grad is None for k,t in tensors.items() if k=='teacher' or k[0]=='t' and k[1:].isdigit())

@pytest.mark.parametrize('e', extras, ids=lambda e: e['id'])
def test_what_else_the_authors_compute_is_equal(e):
    tensors = {k: torch.tensor(arrays[v]) for k,v in {**e['inputs'], **e['params']}.items()}
    got = golden.EXTRAS[e['method']]({k: t.double() if t.is_floating_point() else t for k,t in tensors.items()}, e['hyperparameters'])
    for k,v in got.items():
        expected = torch.as_tensor(arrays[e['expected_extra'][k]] if isinstance(e['expected_extra'][k], str) else e['expected_extra'][k]).double()
        assert (v-expected).abs().max()<=1e-6*expected.abs().max()+1e-10
