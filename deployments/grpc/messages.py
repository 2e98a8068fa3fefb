"""The messages of the Open Inference Protocol's gRPC service, in a descriptor pool of their own.

The default pool of a process takes each message name once, and client libraries of the protocol put theirs there.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

PACKAGE = "inference"
SERVICE = f"{PACKAGE}.GRPCInferenceService"
# Fields as in a .proto file; a name with a dot is a message within a message, and a `oneof` has all its fields.
MESSAGES: dict[str, tuple[str, ...]] = {
    "ServerLiveRequest": (),
    "ServerLiveResponse": ("bool live = 1",),
    "ServerReadyRequest": (),
    "ServerReadyResponse": ("bool ready = 1",),
    "ModelReadyRequest": ("string name = 1", "string version = 2"),
    "ModelReadyResponse": ("bool ready = 1",),
    "ServerMetadataRequest": (),
    "ServerMetadataResponse": ("string name = 1", "string version = 2", "repeated string extensions = 3"),
    "ModelMetadataRequest": ("string name = 1", "string version = 2"),
    "ModelMetadataResponse": (
        "string name = 1",
        "repeated string versions = 2",
        "string platform = 3",
        "repeated ModelMetadataResponse.TensorMetadata inputs = 4",
        "repeated ModelMetadataResponse.TensorMetadata outputs = 5",
    ),
    "ModelMetadataResponse.TensorMetadata": ("string name = 1", "string datatype = 2", "repeated int64 shape = 3"),
    "InferParameter": (
        "oneof parameter_choice bool bool_param = 1",
        "oneof parameter_choice int64 int64_param = 2",
        "oneof parameter_choice string string_param = 3",
        "oneof parameter_choice double double_param = 4",
        "oneof parameter_choice uint64 uint64_param = 5",
    ),
    "InferTensorContents": (
        "repeated bool bool_contents = 1",
        "repeated int32 int_contents = 2",
        "repeated int64 int64_contents = 3",
        "repeated uint32 uint_contents = 4",
        "repeated uint64 uint64_contents = 5",
        "repeated float fp32_contents = 6",
        "repeated double fp64_contents = 7",
        "repeated bytes bytes_contents = 8",
    ),
    "ModelInferRequest": (
        "string model_name = 1",
        "string model_version = 2",
        "string id = 3",
        "map InferParameter parameters = 4",
        "repeated ModelInferRequest.InferInputTensor inputs = 5",
        "repeated ModelInferRequest.InferRequestedOutputTensor outputs = 6",
        "repeated bytes raw_input_contents = 7",
    ),
    "ModelInferRequest.InferInputTensor": (
        "string name = 1",
        "string datatype = 2",
        "repeated int64 shape = 3",
        "map InferParameter parameters = 4",
        "InferTensorContents contents = 5",
    ),
    "ModelInferRequest.InferRequestedOutputTensor": ("string name = 1", "map InferParameter parameters = 2"),
    "ModelInferResponse": (
        "string model_name = 1",
        "string model_version = 2",
        "string id = 3",
        "map InferParameter parameters = 4",
        "repeated ModelInferResponse.InferOutputTensor outputs = 5",
        "repeated bytes raw_output_contents = 6",
    ),
    "ModelInferResponse.InferOutputTensor": (
        "string name = 1",
        "string datatype = 2",
        "repeated int64 shape = 3",
        "map InferParameter parameters = 4",
        "InferTensorContents contents = 5",
    ),
    "RepositoryIndexRequest": ("string repository_name = 1", "bool ready = 2"),
    "RepositoryIndexResponse": ("repeated RepositoryIndexResponse.ModelIndex models = 1",),
    "RepositoryIndexResponse.ModelIndex": (
        "string name = 1",
        "string version = 2",
        "string state = 3",
        "string reason = 4",
    ),
}
FIELD = re.compile(r"(?:(repeated|map|oneof \w+) )?([\w.]+) (\w+) = (\d+)")


@cache
def message(name: str) -> Any:
    """The class of the message ``name``."""
    return GetMessageClass(_POOL.FindMessageTypeByName(f"{PACKAGE}.{name}"))


def file_descriptor() -> FileDescriptorProto:
    """All messages, as protobuf describes them."""
    file = FileDescriptorProto(name="open_inference.proto", package=PACKAGE, syntax="proto3")
    built: dict[str, DescriptorProto] = {}
    for path, fields in MESSAGES.items():
        outer, _, name = path.rpartition(".")
        built[path] = (built[outer].nested_type if outer else file.message_type).add(name=name)
        for field in fields:
            _add_field(built[path], path, field)
    return file


def _add_field(owner: DescriptorProto, path: str, text: str) -> None:
    match = FIELD.fullmatch(text)
    if match is None:
        raise ValueError(f"{path}: not a field: {text}")
    kind, type_, name, number = match[1] or "", match[2], match[3], int(match[4])
    field = owner.field.add(name=name, number=number, label=FieldDescriptorProto.LABEL_OPTIONAL)
    if kind == "map":  # a list of entries of two fields
        entry = owner.nested_type.add(name=f"{name.title()}Entry")
        entry.options.map_entry = True
        _add_field(entry, path, "string key = 1")
        _add_field(entry, path, f"{type_} value = 2")
        type_ = f"{path}.{entry.name}"
    if kind in ("map", "repeated"):
        field.label = FieldDescriptorProto.LABEL_REPEATED
    elif kind:
        if not owner.oneof_decl:
            owner.oneof_decl.add(name=kind.partition(" ")[2])
        field.oneof_index = 0
    if type_[0].isupper():
        field.type, field.type_name = FieldDescriptorProto.TYPE_MESSAGE, f".{PACKAGE}.{type_}"
    else:
        field.type = FieldDescriptorProto.Type.Value(f"TYPE_{type_.upper()}")


_POOL = DescriptorPool()
_POOL.AddSerializedFile(file_descriptor().SerializeToString())
