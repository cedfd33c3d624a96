"Every loss gives its authors' value and gradient."
import golden
import pytest
import torch

known,arrays = golden.load()
entries = [e for e in known if e['method'] in golden.LOSSES]
extras = [e for e in known if e['method'] in golden.EXTRAS]
assert {e['method'] for e in entries}==set(golden.LOSSES), 'a loss without a golden case'

def tensors_of(e, dtype=None):
    "Inputs and parameters of a case, of `dtype` if they are floating point numbers"
    tensors = {k: torch.tensor(arrays[v]) for k,v in {**e['inputs'], **e['params']}.items()}
    return {k: t.to(dtype) if dtype and t.is_floating_point() else t for k,t in tensors.items()}

def run(e, dtype):
    "The loss, and the gradients that the authors' program has too"
    tensors = tensors_of(e, dtype)
    for g in e['grads']: tensors[g].requires_grad_()
    loss = golden.LOSSES[e['method']](tensors, e['hyperparameters'])
    assert loss.ndim==0
    loss.backward()
    return loss.item(),{g: tensors[g].grad.double() for g in e['grads']}

@pytest.mark.parametrize('e', entries, ids=lambda e: e['id'])
def test_equals_the_authors_in_float64(e):
    loss,grads = run(e, torch.float64)
    assert abs(loss-e['expected_loss'])<=1e-6*abs(e['expected_loss'])+1e-10
    if e['check']!='loss+grad': return
    for g,key in e['grads'].items():
        expected = torch.tensor(arrays[key]).double()
        assert (grads[g]-expected).abs().max()<=1e-5*expected.abs().max()+1e-10

@pytest.mark.parametrize('e', entries, ids=lambda e: e['id'])
def test_float32_is_as_near_as_float32_can_be(e):
    loss,grads = run(e, torch.float32)
    peer = e.get('peer_float32') or {}
    def relative(floor, name):
        error = peer.get(name)
        return max(floor, 20*error) if isinstance(error, float) else floor      # else the peer's is not finite
    absolute = 1e-5 if 'zero-loss' in e['tags'] else 1e-10
    assert abs(loss-e['expected_loss'])<=relative(1e-5, 'rel_err_loss')*abs(e['expected_loss'])+absolute
    for g,key in e['grads'].items():
        expected = torch.tensor(arrays[key]).double()
        assert (grads[g]-expected).abs().max()<=relative(1e-4, 'rel_err_grad')*expected.abs().max()+absolute

@pytest.mark.parametrize('e', entries, ids=lambda e: e['id'])
def test_gradients_never_reach_the_teacher(e):
    tensors = tensors_of(e)
    for t in tensors.values():
        if t.is_floating_point(): t.requires_grad_()
    golden.LOSSES[e['method']](tensors, e['hyperparameters']).backward()
    assert all(t.grad is None for k,t in tensors.items() if k=='teacher' or k[0]=='t' and k[1:].isdigit())

@pytest.mark.parametrize('e', extras, ids=lambda e: e['id'])
def test_what_else_the_authors_compute_is_equal(e):
    values = golden.EXTRAS[e['method']](tensors_of(e, torch.float64), e['hyperparameters'])
    for k,v in values.items():
        expected = e['expected_extra'][k]
        if isinstance(expected, str): expected = arrays[expected]
        expected = torch.as_tensor(expected).double()
        assert (v-expected).abs().max()<=1e-6*expected.abs().max()+1e-10
