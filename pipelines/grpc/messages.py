"""Messages of the protocol, from its public specification, without generated code.

https://github.com/kserve/open-inference-protocol (inference), the model repository, statistics
and streaming extensions of Triton, and https://github.com/grpc/grpc/blob/master/doc/health-checking.md.
They live in a descriptor pool of their own: a client library in the same process brings its own
of the same names, and protobuf has one of each name in one pool.
"""

from __future__ import annotations

import functools
import re
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

INFERENCE = "inference"
HEALTH = "grpc.health.v1"

_MESSAGES = {
    INFERENCE: """
ServerLiveRequest
ServerLiveResponse: bool live = 1
ServerReadyRequest
ServerReadyResponse: bool ready = 1
ModelReadyRequest: string name = 1; string version = 2
ModelReadyResponse: bool ready = 1
ServerMetadataRequest
ServerMetadataResponse: string name = 1; string version = 2; string* extensions = 3
ModelMetadataRequest: string name = 1; string version = 2
ModelMetadataResponse.TensorMetadata: string name = 1; string datatype = 2; int64* shape = 3
ModelMetadataResponse: string name = 1; string* versions = 2; string platform = 3;
    ModelMetadataResponse.TensorMetadata* inputs = 4;
    ModelMetadataResponse.TensorMetadata* outputs = 5
InferParameter: bool? bool_param = 1; int64? int64_param = 2; string? string_param = 3;
    double? double_param = 4; uint64? uint64_param = 5
InferTensorContents: bool* bool_contents = 1; int32* int_contents = 2; int64* int64_contents = 3;
    uint32* uint_contents = 4; uint64* uint64_contents = 5; float* fp32_contents = 6;
    double* fp64_contents = 7; bytes* bytes_contents = 8
ModelInferRequest.InferInputTensor: string name = 1; string datatype = 2; int64* shape = 3;
    InferParameter% parameters = 4; InferTensorContents contents = 5
ModelInferRequest.InferRequestedOutputTensor: string name = 1; InferParameter% parameters = 2
ModelInferRequest: string model_name = 1; string model_version = 2; string id = 3;
    InferParameter% parameters = 4; ModelInferRequest.InferInputTensor* inputs = 5;
    ModelInferRequest.InferRequestedOutputTensor* outputs = 6; bytes* raw_input_contents = 7
ModelInferResponse.InferOutputTensor: string name = 1; string datatype = 2; int64* shape = 3;
    InferParameter% parameters = 4; InferTensorContents contents = 5
ModelInferResponse: string model_name = 1; string model_version = 2; string id = 3;
    InferParameter% parameters = 4; ModelInferResponse.InferOutputTensor* outputs = 5;
    bytes* raw_output_contents = 6
ModelStreamInferResponse: string error_message = 1; ModelInferResponse infer_response = 2
ModelConfigRequest: string name = 1; string version = 2
ModelInput: string name = 1; int32 data_type = 2; int64* dims = 4
ModelOutput: string name = 1; int32 data_type = 2; int64* dims = 3
ModelConfig: string name = 1; string platform = 2; int32 max_batch_size = 4; ModelInput* input = 5;
    ModelOutput* output = 6
ModelConfigResponse: ModelConfig config = 1
ModelStatisticsRequest: string name = 1; string version = 2
StatisticDuration: uint64 count = 1; uint64 ns = 2
InferStatistics: StatisticDuration success = 1; StatisticDuration fail = 2;
    StatisticDuration queue = 3; StatisticDuration compute_input = 4;
    StatisticDuration compute_infer = 5; StatisticDuration compute_output = 6
InferBatchStatistics: uint64 batch_size = 1
ModelStatistics: string name = 1; string version = 2; uint64 inference_count = 4;
    uint64 execution_count = 5; InferStatistics inference_stats = 6;
    InferBatchStatistics* batch_stats = 7
ModelStatisticsResponse: ModelStatistics* model_stats = 1
ModelRepositoryParameter: bool? bool_param = 1; int64? int64_param = 2; string? string_param = 3;
    bytes? bytes_param = 4
RepositoryIndexRequest: string repository_name = 1; bool ready = 2
RepositoryIndexResponse.ModelIndex: string name = 1; string version = 2; string state = 3;
    string reason = 4
RepositoryIndexResponse: RepositoryIndexResponse.ModelIndex* models = 1
RepositoryModelLoadRequest: string repository_name = 1; string model_name = 2;
    ModelRepositoryParameter% parameters = 3
RepositoryModelLoadResponse
RepositoryModelUnloadRequest: string repository_name = 1; string model_name = 2;
    ModelRepositoryParameter% parameters = 3
RepositoryModelUnloadResponse
""",
    HEALTH: """
HealthCheckRequest: string service = 1
HealthCheckResponse: int32 status = 1
""",
}
"""One message a line: type, ``*`` repeated, ``%`` a map from strings, ``?`` one of several."""

DATA_TYPES = {
    "BOOL": 1,
    "UINT8": 2,
    "INT8": 6,
    "INT16": 7,
    "INT32": 8,
    "INT64": 9,
    "FP16": 10,
    "FP32": 11,
    "FP64": 12,
    "BF16": 14,
}
"""Number of a datatype in a model's configuration, which is an enumeration there."""
SERVING, NOT_SERVING, SERVICE_UNKNOWN = 1, 2, 3
"""Values of ``HealthCheckResponse.status``."""

_Field = descriptor_pb2.FieldDescriptorProto
_LINE = re.compile(r"(?P<type>[\w.]+)(?P<kind>[*%?]?) (?P<name>\w+) = (?P<number>\d+)")


def _file(package: str, text: str) -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(
        name=f"plinth/{package}.proto", package=package, syntax="proto3"
    )
    lines = re.sub(r"\n +", " ", text).split("\n")
    made: dict[str, descriptor_pb2.DescriptorProto] = {}
    for line in sorted(filter(None, lines), key=lambda one: one.partition(":")[0].count(".")):
        name, _, fields = line.partition(":")
        outer, _, inner = name.rpartition(".")
        message = made[outer].nested_type.add() if outer else file.message_type.add()
        message.name, made[name] = inner, message
        for found in _LINE.finditer(fields):
            _add(message, f".{package}.", name, found)
    return file


def _add(message: Any, package: str, owner: str, found: re.Match[str]) -> None:
    name, kind = found["name"], found["kind"]
    scalar = found["type"] if found["type"][0].islower() else None
    field = message.field.add(name=name, number=int(found["number"]))
    field.label = _Field.LABEL_REPEATED if kind in ("*", "%") else _Field.LABEL_OPTIONAL
    if kind == "%":
        entry = message.nested_type.add(name="".join(map(str.title, name.split("_"))) + "Entry")
        entry.options.map_entry = True
        label = _Field.LABEL_OPTIONAL
        entry.field.add(name="key", number=1, type=_Field.TYPE_STRING, label=label)
        value = entry.field.add(name="value", number=2, type=_Field.TYPE_MESSAGE, label=label)
        value.type_name = package + found["type"]
        field.type, field.type_name = _Field.TYPE_MESSAGE, f"{package}{owner}.{entry.name}"
    elif scalar is None:
        field.type, field.type_name = _Field.TYPE_MESSAGE, package + found["type"]
    else:
        field.type = getattr(_Field, f"TYPE_{scalar.upper()}")
    if kind == "?":
        if not message.oneof_decl:
            message.oneof_decl.add(name="parameter_choice")
        field.oneof_index = 0


_POOL = descriptor_pool.DescriptorPool()
for _package, _text in _MESSAGES.items():
    _POOL.Add(_file(_package, _text))


@functools.cache
def message(name: str, package: str = INFERENCE) -> Any:
    """The class of a message."""
    return message_factory.GetMessageClass(_POOL.FindMessageTypeByName(f"{package}.{name}"))
