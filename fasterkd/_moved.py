"Where names of earlier versions are now; importing one from its old place warns. This file goes with the next release."
import importlib, importlib.abc, importlib.util, sys, warnings

# old module: (new module, the names that moved there, old=new where the name is another)
_moved = {
    'adapters': [
        ('auxiliary', 'Beside=AuxiliaryOptimizer remembers'),
    ],
    'asking': [
        ('teacher_forward', 'BeforeForward before_forward streams_of SideStream Asking=TeacherForward'),
    ],
    'bridges': [
        ('auxiliary', 'Bridges=AuxiliaryModules is_made=is_built'),
    ],
    'cached': [
        ('cache_file', 'Rows=CacheRows layout few_of=top_logits all_of=full_logits'),
        ('probe_learner', 'in_a_fit=as_in_a_fit'),
    ],
    'callback': [
        ('default_loss', 'default_loss'),
    ],
    'columns': [
        ('fit_state', 'Column add_columns hidden_columns drop_columns'),
    ],
    'comparison': [
        ('evaluation', '''
            Judged=Evaluation decided=decisions_of agreement share_right Kept=OutputCache
            who_is=teacher_identity judged=evaluated
        '''),
    ],
    'described': [
        ('fingerprints', 'hashed checksum weights_hash'),
        ('descriptions', 'described set_later=changed_by_methods structure spelled_out=described read_by_name'),
    ],
    'endings': [
        ('fit_state', 'Closer'),
    ],
    'extras': [
        ('display', 'extra'),
    ],
    'finite': [
        ('nonfinite', 'not_finite_items refuse_nan why_not_finite harm LossWatch'),
    ],
    'layers': [
        ('model_state', '''
            random_kept=restored_random_state buffers_of=saved_buffers put_back=restore_buffers n_params
            device_of kernels=conv_weights is_held=shares_memory as_it_came=restored unchanged
        '''),
    ],
    'loaders': [
        ('fingerprints', 'n_places=n_sampled glimpse=fingerprint alike=same_fingerprints tensors_in'),
        ('dataset_indices', '''
            Places=DatasetIndices labels_of inputs_of through=loader_of in_order=unshuffled_indices
            data_key
        '''),
        ('random_transforms', 'random_tfms vary=items_vary what_varies'),
        ('views', 'seeded view_batches replayed shuffled'),
    ],
    'losses.core': [
        ('losses.core', '''
            on_request=optional_inputs takes=accepted_inputs reads=used_inputs listed=as_list
            exactly=in_full_precision read_inside=inside_of given=loss_inputs needs=requirements
            common=required_of agree=satisfied
        '''),
    ],
    'losses.inside': [
        ('losses.gradients_and_weights', 'input_gradient InputGradient WeightMatching'),
    ],
    'preflight': [
        ('probe_learner', 'twin=copied_callback prepares=prepares_batches'),
        ('preflight', 'warn_of_learnt_by_heart=warn_of_memorised'),
    ],
    'recipes': [
        ('compare', '''
            set_loaders=seed_loaders begin=new_learner start_of=start_hash described_learner is_loss
            as_maker callbacks_of compare
        '''),
    ],
    'terms': [
        ('terms', '''
            share=checked_weight progress=as_schedule paired=paired_layers in_parts=learned_losses
            unmake=reset_parts is_made_late=is_built_late
        '''),
    ],
    'unlabelled': [
        ('fit_state', 'no_task Unlabelled'),
    ],
}

def _now(old:str)->dict:
    "Old name → where it is now, as (module, name), for what was in the module `old`"
    pairs = [(new, *n.partition('=')) for new,names in _moved.get(old, ()) for n in names.split()]
    return {was: (new, name or was) for new,was,_,name in pairs}

def moved_names(
    module:str # `__name__` of a module
):
    "A `__getattr__` for `module` that finds what has moved out of it, with a DeprecationWarning"
    old = module.removeprefix('fasterkd.')
    def find(name):
        if name not in _now(old): raise AttributeError(f"module {module!r} has no attribute {name!r}")
        to,now = _now(old)[name]
        warnings.warn(f"{module}.{name} is now fasterkd.{to}.{now}", DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(f'fasterkd.{to}'), now)
    return find

class _OldModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    "Finds modules that are no longer there"
    def find_spec(self, name, path=None, target=None):
        package,_,old = name.partition('.')
        if package=='fasterkd' and old in _moved: return importlib.util.spec_from_loader(name, self)

    def exec_module(self, module):
        new = ', '.join(f'fasterkd.{to}' for to,_ in _moved[module.__name__.removeprefix('fasterkd.')])
        warnings.warn(f"{module.__name__} is now {new}", DeprecationWarning, stacklevel=2)
        module.__getattr__ = moved_names(module.__name__)
        module.__all__ = [*_now(module.__name__.removeprefix('fasterkd.'))]

sys.meta_path.append(_OldModules())     # asked last, so only for modules that nobody else finds
