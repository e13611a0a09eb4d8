"""The start of a run: geometry, text tokenizer and initial parameters.

Sources of parameters, in order of precedence:
1. a checkpoint in WORKDIR, from which the loop resumes;
2. `init_from`, a checkpoint in either layout; parameters that the stage adds are initialised;
3. `model`, a geometry whose parameters are initialised.
"""

import dataclasses
import functools
import hashlib
import operator
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from blip3o_jax import sharding, treepath
from blip3o_jax.config import Blip3oConfig, schema
from blip3o_jax.config.model import SAMPLING_DEFAULTS
from blip3o_jax.convert import checkpoint as checkpoints
from blip3o_jax.convert import native
from blip3o_jax.errors import UserError, call_custom, require, type_of
from blip3o_jax.experiment.config import ExperimentConfig
from blip3o_jax.models import blip3o
from blip3o_jax.objectives import Objective
from blip3o_jax.objectives.objective import MakeParams
from blip3o_jax.types import Params

CHANGEABLE = ("edit", "schedule", "image_size", *SAMPLING_DEFAULTS)
"""Geometry fields in which a stage may differ from `init_from`."""
READ_BY_A_POLICY = ("decoder", "dit", "connector", "tokens", "edit")
"""Geometry fields that a reference policy must share with the model."""


@dataclasses.dataclass(frozen=True)
class Start:
    """The model and the objective of a run, before weights are read."""

    model: Blip3oConfig  # with the numerics of the run
    objective: Objective
    own: Any  # the objective's settings
    tokenizer_dir: pathlib.Path
    opened: checkpoints.Checkpoint | None  # the checkpoint of init_from

    @functools.cached_property
    def shapes(self) -> Params:
        """Annotated shapes of the model and of the objective's extra modules.

        Raises:
          UserError: an extra module has the name of a part of the model, is no dictionary of parameters, or has some
            that what it is copied from lacks.
        """
        model = blip3o.abstract_params(self.model)
        extra = self.objective.extra_modules(self.model, self.own)
        return {**model, **{name: self._extra_module(model, name, make) for name, make in extra.items()}}

    def _extra_module(self, model: Params, name: str, make: MakeParams) -> Params:
        what, do = f"objective: extra_modules: {name}", "correct the objective"
        require(name not in model, what, "a part of the model", "a name of its own", do)
        require(callable(make), what, type_of(make), "a function of a key", do)
        made = jax.eval_shape(functools.partial(call_custom, what, make), jax.random.key(0))
        require(isinstance(made, Mapping) and made, what, type_of(made), "a dictionary of parameters", do)
        if path := self.objective.copied.get(name):
            leaves = treepath.flatten(model).items()
            source = {own.removeprefix(f"{path}/"): leaf for own, leaf in leaves if own.startswith(f"{path}/")}
            held = _array_shapes(treepath.flatten(made)).items() <= _array_shapes(source).items()
            require(held, f"objective: copied: {name}", path, "a path of the model that has its parameters", do)
        return made

    def loads(self, part: str) -> bool:
        """Whether a part is read from the checkpoint; a backbone of another name is initialised."""
        if self.opened is None or part not in blip3o.modules(self.opened.config):
            return False
        return part != "dit" or self.model.dit.name == self.opened.config.dit.name


def _array_shapes(leaves: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {path: nn.meta.unbox(leaf).shape for path, leaf in leaves.items()}


def open_start(config: ExperimentConfig) -> Start:
    """Opens the start of a run, without reading weights.

    Raises:
      UserError: the geometry differs from the checkpoint's in other than the backbone or the fields in CHANGEABLE.
    """
    opened = None if config.init_from is None else open_named(config, config.init_from)
    model = config.model or opened.config
    if opened is not None:
        checkpoints.check_backbone(opened, config.backbone)
        found = schema.differences(geometry(model), geometry(opened.config))
        changeable = CHANGEABLE + ("dit",) * (model.dit.name != opened.config.dit.name)
        different = [name for name in found if name.split(".")[0] not in changeable]
        if different:
            got, expected = found[different[0]]
            raise UserError(
                f"model.{different[0]}",
                got=got,
                expected=f"{expected}, as in {config.init_from} ({len(different)} such differences)",
                do="make them equal, or leave `model` out",
            )
    objective, own = config.resolve_objective()
    model = objective.geometry(model, own)
    numerics = config.numerics
    how = {"remat": numerics.remat, "unroll": numerics.unroll}
    model = schema.with_dtype(model, dtype=numerics.dtype, param_dtype="float32", **how)
    tokenizer_dir = pathlib.Path(config.tokenizer) if config.tokenizer else opened.tokenizer_dir
    return Start(model, objective, own, tokenizer_dir, opened)


def open_named(config: ExperimentConfig, path: str) -> checkpoints.Checkpoint:
    """Opens a checkpoint with the backbone that the experiment names."""
    named = config.backbone or (config.model and config.model.dit.name)
    return checkpoints.open_checkpoint(path, backbone=named)


def identities(config: ExperimentConfig, start: Start) -> dict[str, str | None]:
    """Returns identifiers of the initial weights, reference weights and text tokenizer, independent of their paths."""
    paths = {"init_from": config.init_from, "reference_from": config.reference_from}
    weights = {name: path and open_named(config, path).identity for name, path in paths.items()}
    digest = hashlib.sha256()
    for name, path in sorted(native.Origin.of_tokenizer(start.tokenizer_dir).files.items()):
        content = path.read_bytes()
        digest.update(f"{name} {len(content)} ".encode() + content)
    return {**weights, "tokenizer": digest.hexdigest()[:12]}


class Parameters:
    """Initial parameters, read or initialised part by part."""

    def __init__(self, config: ExperimentConfig, start: Start, mesh: Mesh | None):
        self._config, self._start, self._mesh = config, start, mesh
        extra = start.objective.extra_modules(start.model, start.own)
        self._makers = {**blip3o.initializers(start.model), **extra}
        shardings = sharding.shardings_of(start.shapes, mesh)
        self._shardings = {part: treepath.flatten(own) for part, own in shardings.items()}

    def select(self, wanted: Params, dtype: str) -> Params:
        """Returns the values of the leaves of `wanted`, in `dtype`."""
        paths = treepath.flatten(wanted)
        leaves: dict[str, jax.Array] = {}
        for part in sorted({path.split("/")[0] for path in paths}):
            values = treepath.flatten({part: self._part(part)})
            leaves.update({path: value.astype(dtype) for path, value in values.items() if path in paths})
        return treepath.unflatten(leaves)

    def _part(self, part: str) -> Params:
        if copied := self._start.objective.copied.get(part):
            source, *path = copied.split("/")
            return functools.reduce(operator.getitem, path, self._source(source))
        loaded: Params = {}
        if self._start.loads(part):
            loaded = self._start.opened.load_params(mesh=self._mesh, param_dtype="float32", parts=[part])[part]
        lacking = self._shardings[part].keys() - treepath.flatten(loaded).keys()
        return treepath.merge(loaded, self._fresh(part, lacking)) if lacking else loaded

    def _fresh(self, part: str, paths: Collection[str]) -> Params:
        """Initialises some leaves of a part."""

        def make(key: jax.Array) -> dict[str, jax.Array]:
            leaves = treepath.flatten(nn.meta.unbox(self._makers[part](key)))
            return {path: leaves[path] for path in paths}

        key = jax.random.fold_in(jax.random.key(self._config.loop.seed), sorted(self._makers).index(part))
        shardings = None if self._mesh is None else {path: self._shardings[part][path] for path in paths}
        return treepath.unflatten(jax.jit(make, out_shardings=shardings)(key))

    def _source(self, part: str) -> Params:
        """Returns a part to copy, from the checkpoint `reference_from` if set, else from the model."""
        name = self._config.reference_from
        if name is None:
            return self._part(part)
        opened = open_named(self._config, name)
        found = schema.differences(geometry(opened.config), geometry(self._start.model))
        different = [path for path in found if path.split(".")[0] in READ_BY_A_POLICY]
        if different:
            raise UserError(
                f"reference_from: {name} differs from the model in {', '.join(different)}",
                expected="its geometry",
                do="choose a checkpoint of the same model, or leave it out",
            )
        return opened.load_params(mesh=self._mesh, param_dtype="float32", parts=[part])[part]


def geometry(model: Blip3oConfig) -> Blip3oConfig:
    """Returns the configuration with default numerics, for comparing models and storing with weights."""
    return schema.with_dtype(model, dtype="float32", param_dtype="float32", remat="none", unroll=False)
