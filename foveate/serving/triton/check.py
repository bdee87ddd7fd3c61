"""Holds a package's Triton repository to its manifest, to its graphs, and to Triton's own schema.

The schema is the message `ModelConfig` of tritonclient; no server is needed.
"""

from __future__ import annotations

import importlib
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from foveate.errors import ArtifactError
from foveate.serving.triton.config import Config, TensorSpec, of_graph
from foveate.serving.triton.files import FOLDER, check_files


def check(package: str | Path) -> bool:
    """Whether configurations were held to Triton's schema and the graphs, which takes tritonclient; hashes always are.

    Raises ArtifactError for a file that is not the one that was written, or that was not written at all; for a
    configuration that Triton would not parse; and for a tensor that it leaves out, names twice, or describes otherwise
    than the graph.
    """
    package = Path(package)
    check_files(package)
    schema = _schema()
    if schema is None:
        return False
    paths = sorted((package / FOLDER).glob("*/config.pbtxt"))
    configs = {path: _parsed(path, *schema) for path in paths}
    graphs: dict[str, Config] = {}
    for path, config in configs.items():
        if config.backend != "python":
            graphs[config.name] = graph = of_graph(config.name, path.parent / "1" / "model.onnx")
            for kind, given, there in (("input", config.input, graph.inputs), ("output", config.output, graph.outputs)):
                _check_tensors(f"{path}, {kind}", _specs(schema[1], given), there)
    names = json.dumps({name: graph.names() for name, graph in sorted(graphs.items())})
    for path, config in configs.items():
        if config.backend == "python" and config.parameters["graphs"].string_value != names:
            raise ArtifactError(f"{path}: the parameter graphs does not list the tensors of the graphs beside it")
    return True


def _schema() -> tuple[Any, Any] | None:
    """protobuf's text format and Triton's messages, which have no types for mypy."""
    try:
        messages = importlib.import_module("tritonclient.grpc.model_config_pb2")
        return importlib.import_module("google.protobuf.text_format"), messages
    except ImportError:
        return None


def _parsed(path: Path, text_format: Any, messages: Any) -> Any:
    config = messages.ModelConfig()
    try:
        text_format.Parse(path.read_text(encoding="utf-8"), config)
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} is no configuration of Triton's: {str(error).splitlines()[0]}") from None
    if config.name != path.parent.name:
        raise ArtifactError(f"{path} names the model {config.name!r}; it must be that of its folder")
    return config


def _specs(messages: Any, given: Iterable[Any]) -> list[TensorSpec]:
    return [TensorSpec(each.name, messages.DataType.Name(each.data_type), tuple(each.dims)) for each in given]


def _check_tensors(where: str, given: Iterable[TensorSpec], there: Iterable[TensorSpec]) -> None:
    counts = Counter(spec.name for spec in given)
    wanted = {spec.name: spec for spec in there}
    for name in sorted(counts.keys() | wanted.keys()):
        if name not in wanted:
            raise ArtifactError(f"{where}: the graph has no {name}")
        if counts[name] != 1:
            raise ArtifactError(f"{where}: {name} stands there {counts[name]} times; it must stand there once")
    for spec in given:
        if spec != wanted[spec.name]:
            raise ArtifactError(f"{where}: {spec.to_text()} should be {wanted[spec.name].to_text()}")
