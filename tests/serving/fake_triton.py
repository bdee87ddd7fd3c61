"""A Triton server of one process: serves a model repository by ONNX Runtime, and runs its Python models.

It holds every tensor to the configuration, as Triton does, so that a Python model that sends something else fails here.
`Server(folder).module()` is what `import triton_python_backend_utils` gives a Python model.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2

NUMPY = {
    "TYPE_FP32": np.float32,
    "TYPE_FP16": np.float16,
    "TYPE_INT64": np.int64,
    "TYPE_INT32": np.int32,
    "TYPE_BOOL": np.bool_,
}


class Tensor:
    def __init__(self, name: str, array: np.ndarray[Any, Any]) -> None:
        assert array.flags.c_contiguous
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray[Any, Any]:
        view = self._array.view()
        view.flags.writeable = False  # it would be memory of the server
        return view


class TritonError:
    INTERNAL, INVALID_ARG = "internal", "invalid argument"

    def __init__(self, message: str, code: str = INTERNAL) -> None:
        self._message, self.code = message, code

    def message(self) -> str:
        return self._message


class Response:
    def __init__(self, output_tensors: list[Tensor] | None = None, error: TritonError | None = None) -> None:
        self.tensors = {tensor.name(): tensor for tensor in output_tensors or []}
        self._error = error

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error


class Request:
    """A client's request. stays: after how many looks the client is gone; None: never."""

    def __init__(self, stays: int | None = None, **inputs: np.ndarray[Any, Any]) -> None:
        self.tensors = {name: Tensor(name, np.ascontiguousarray(value)) for name, value in inputs.items()}
        self.stays, self.looked = stays, 0
        self.sent: list[Response] = []
        self.ended = False

    def is_cancelled(self) -> bool:
        self.looked += 1
        return self.stays is not None and self.looked > self.stays

    def get_response_sender(self) -> Request:
        return self

    def send(self, response: Response | None = None, flags: int = 0) -> None:
        assert not self.ended, "sent behind the end"
        if response is not None:
            self.sent.append(response)
        self.ended = bool(flags)


class Server:
    """Serves the models of a repository."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.configs: dict[str, Any] = {}
        for path in folder.glob("*/config.pbtxt"):
            self.configs[path.parent.name] = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
        self.sessions: dict[str, onnxruntime.InferenceSession] = {}
        self.asked: list[str] = []
        self.models: dict[str, Any] = {}

    def model(self, name: str) -> Any:
        """A Python model, as Triton makes it from its file and configuration."""
        if name not in self.models:
            spec = importlib.util.spec_from_file_location(f"triton_{name}", self.folder / name / "1" / "model.py")
            assert spec is not None and spec.loader is not None
            loaded = importlib.util.module_from_spec(spec)
            before = sys.modules.get("triton_python_backend_utils")
            sys.modules["triton_python_backend_utils"] = self.module()
            try:
                spec.loader.exec_module(loaded)
            finally:
                sys.modules.pop("triton_python_backend_utils")
                if before is not None:
                    sys.modules["triton_python_backend_utils"] = before
            text = json_format.MessageToJson(self.configs[name], preserving_proto_field_name=True)
            self.models[name] = loaded.TritonPythonModel()
            self.models[name].initialize({"model_config": text, "model_name": name})
        return self.models[name]

    def ask(self, name: str, request: Request) -> list[Response]:
        """The responses of a Python model, each held to its configuration."""
        self.hold(self.configs[name].input, request.tensors, some=True)
        answers = self.model(name).execute([request])
        if answers is None:
            assert request.ended, "a stream without an end"
            answers = request.sent
        for answer in answers:
            if not answer.has_error():
                self.hold(self.configs[name].output, answer.tensors)
        return list(answers)

    def hold(self, specs: Any, tensors: dict[str, Tensor], some: bool = False) -> None:
        """Fail where tensors are not those of a configuration. some: the optional ones may be missing."""
        wanted = {spec.name: spec for spec in specs}
        needed = {name for name, spec in wanted.items() if not (some and spec.optional)}
        assert needed <= tensors.keys() <= wanted.keys()
        for name, tensor in tensors.items():
            array, spec = tensor.as_numpy(), wanted[name]
            assert array.dtype == NUMPY[model_config_pb2.DataType.Name(spec.data_type)], name
            assert len(array.shape) == len(spec.dims), name
            assert all(size in (-1, there) for size, there in zip(spec.dims, array.shape, strict=True)), name

    def run(self, name: str, tensors: list[Tensor], wanted: list[str]) -> Response:
        """Run a graph, as Triton's ONNX Runtime backend does."""
        self.asked.append(name)
        if name not in self.sessions:
            self.sessions[name] = onnxruntime.InferenceSession(self.folder / name / "1" / "model.onnx")
        given = {tensor.name(): tensor for tensor in tensors}
        self.hold(self.configs[name].input, given)
        try:
            found = self.sessions[name].run(wanted, {key: value.as_numpy() for key, value in given.items()})
        except Exception as error:
            return Response(error=TritonError(str(error)))
        made = [Tensor(key, np.ascontiguousarray(value)) for key, value in zip(wanted, found, strict=True)]
        outputs = {spec.name: spec for spec in self.configs[name].output}
        self.hold([outputs[key] for key in wanted], {tensor.name(): tensor for tensor in made})
        return Response(made)

    def module(self) -> ModuleType:
        """What a Python model imports."""
        server = self

        class InferenceRequest:
            def __init__(
                self,
                model_name: str,
                requested_output_names: list[str],
                inputs: list[Tensor],
                preferred_memory: Any = None,
            ) -> None:
                self.given = model_name, inputs, requested_output_names

            def exec(self) -> Response:
                return server.run(*self.given)

        found = ModuleType("triton_python_backend_utils")
        found.__dict__.update(
            Tensor=Tensor,
            TritonError=TritonError,
            TritonModelException=RuntimeError,
            InferenceRequest=InferenceRequest,
            InferenceResponse=Response,
            PreferredMemory=lambda kind, number: SimpleNamespace(kind=kind, number=number),
            TRITONSERVER_MEMORY_CPU=0,
            TRITONSERVER_RESPONSE_COMPLETE_FINAL=1,
            get_input_tensor_by_name=lambda request, name: request.tensors.get(name),
            get_output_tensor_by_name=lambda response, name: response.tensors.get(name),
            using_decoupled_model_transaction_policy=lambda config: bool(
                config.get("model_transaction_policy", {}).get("decoupled", False)
            ),
        )
        return found
