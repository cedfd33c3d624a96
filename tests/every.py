"Every public loss in a term that suits it, on two small nets: for checks and timings."
from collections import OrderedDict
from functools import partial

import torch
from fasterkd.all import *
from fasterkd.losses import *
from torch import nn

def convs(nf, ni=1, n_out=10):
    "Ends in a global pooling, as the methods expect that ask the teacher's classifier"
    def block(i, ni, nf, stride):
        return {f'conv{i}': nn.Conv2d(ni, nf, 3, stride, 1), f'bn{i}': nn.BatchNorm2d(nf), f'act{i}': nn.ReLU()}
    head = dict(pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), head=nn.Linear(2*nf, n_out))
    return nn.Sequential(OrderedDict(**block(1, ni, nf, 1), **block(2, nf, 2*nf, 2), **head))

class Transformer(nn.Module):
    "Patches of side `patch`, `depth` layers, the mean of the tokens"
    def __init__(self, width, heads=2, depth=2, ni=1, side=8, patch=2, n_out=10):
        super().__init__()
        def layer():
            return nn.TransformerEncoderLayer(width, heads, 2*width, dropout=0., batch_first=True, norm_first=True)
        self.patches = nn.Conv2d(ni, width, patch, patch)
        self.place = nn.Parameter(.02*torch.randn((side//patch)**2, width))
        self.layers = nn.ModuleList(layer() for _ in range(depth))
        self.head = nn.Linear(width, n_out)
    def forward(self, x):
        x = self.patches(x).flatten(2).mT+self.place
        for layer in self.layers: x = layer(x)
        return self.head(x.mean(1))

of_other_data = {'MultiLevel': 'two views of each image', 'TeacherBounded': 'true numbers'}
attentive = 'AttentionMaps', 'ValueRelations', 'HiddenStates'

def models(name, **kwargs):
    "Student and teacher for the loss called `name`"
    if name in attentive: return Transformer(8, **kwargs),Transformer(16, **kwargs)
    return convs(4, **kwargs),convs(8, **kwargs)

of_several_layers = 'FlowOfSolution', 'KnowledgeReview', 'SemanticCalibration'
of_embeddings = 'RelationalDistance', 'RelationalAngle'     # as in the paper: on maps they take long
of_vectors = 'DarkRank', 'ConsecutiveCorrelation', 'InformationCorrelation', 'LogDistance'

def term(name, n_items):
    "A term of the loss called `name`, of default settings where it has them, on a training set of `n_items`"
    loss = every()[name]
    if name in ('AttentionMaps', 'ValueRelations'): return Term(loss, ['layers.0.self_attn', 'layers.1.self_attn'])
    if name=='HiddenStates': return Term(loss, ['layers.0', 'layers.1'])
    if name=='ContrastiveRepresentation': return Term(loss(n_items, negatives=16, dim=8), 'flat')
    if name=='WeightMatching': return Term(loss(['conv1', 'conv2']))
    if name in of_several_layers: return Term(loss, ['bn1', 'bn2'], adapter='auto')
    if name in of_embeddings: return Term(loss, 'flat')
    if name in of_vectors: return Term(loss, 'flat', adapter='auto')
    sees_features = Term(loss if isinstance(loss, type) else partial(loss)).sees_features
    return Term(loss, 'bn2', adapter='auto') if sees_features else Term(loss)
