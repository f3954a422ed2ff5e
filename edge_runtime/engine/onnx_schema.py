"""The part of ONNX's schema that cutting a graph needs, in protobuf alone: the package ``onnx`` stays off the device.

Only what is named here has a name. The rest of a file (attributes, the bytes of constants, shapes) are unknown fields,
which protobuf copies and writes as they came. Numbers and types are those of the published ``onnx.proto3``, which never
gives a number another meaning. The descriptors live in a pool and under a package name of our own, so that they and
those of the real package can be loaded in one process.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

# A message of the classes below; protobuf makes them at import, so there is no static type for them.
Message = Any

# TensorProto.DataType, TensorProto.DataLocation
UNDEFINED, FLOAT, INT64 = 0, 1, 7
EXTERNAL = 1

# Message -> field -> (number, type); ``*`` marks a repeated field. A dot stands for a message inside another.
_MESSAGES: dict[str, dict[str, tuple[int, str]]] = {
    "ModelProto": {
        "ir_version": (1, "int64"),
        "producer_name": (2, "string"),
        "graph": (7, "GraphProto"),
        "opset_import": (8, "OperatorSetIdProto*"),
    },
    "OperatorSetIdProto": {"domain": (1, "string"), "version": (2, "int64")},
    "GraphProto": {
        "node": (1, "NodeProto*"),
        "name": (2, "string"),
        "initializer": (5, "TensorProto*"),
        "input": (11, "ValueInfoProto*"),
        "output": (12, "ValueInfoProto*"),
        "value_info": (13, "ValueInfoProto*"),
    },
    "NodeProto": {
        "input": (1, "string*"),
        "output": (2, "string*"),
        "name": (3, "string"),
        "op_type": (4, "string"),
    },
    "TensorProto": {
        "dims": (1, "int64*"),
        "data_type": (2, "int32"),
        "name": (8, "string"),
        "external_data": (13, "StringStringEntryProto*"),
        "data_location": (14, "int32"),
    },
    "StringStringEntryProto": {"key": (1, "string"), "value": (2, "string")},
    "ValueInfoProto": {"name": (1, "string"), "type": (2, "TypeProto")},
    "TypeProto": {"tensor_type": (1, "TensorTypeProto")},
    "TensorTypeProto": {"elem_type": (1, "int32")},  # TypeProto.Tensor; only numbers are written, not names
}
_PACKAGE = "emberlora.onnx"


def _file() -> descriptor_pb2.FileDescriptorProto:
    kinds = descriptor_pb2.FieldDescriptorProto
    scalars = {"int32": kinds.TYPE_INT32, "int64": kinds.TYPE_INT64, "string": kinds.TYPE_STRING}
    file = descriptor_pb2.FileDescriptorProto(name="emberlora/onnx.proto", package=_PACKAGE, syntax="proto3")
    for message, fields in _MESSAGES.items():
        described = file.message_type.add(name=message)
        for name, (number, stated) in fields.items():
            kind = stated.removesuffix("*")
            field = described.field.add(name=name, number=number, type=scalars.get(kind, kinds.TYPE_MESSAGE))
            if kind not in scalars:
                field.type_name = f".{_PACKAGE}.{kind}"
            if stated.endswith("*"):
                field.label = kinds.LABEL_REPEATED
                continue
            # "Optional" in proto3 is a oneof of one field: what a file states as empty is written as empty again.
            field.label, field.proto3_optional = kinds.LABEL_OPTIONAL, True
            field.oneof_index = len(described.oneof_decl)
            described.oneof_decl.add(name=f"_{name}")
    return file


_pool = descriptor_pool.DescriptorPool()
_pool.Add(_file())


def _class(message: str) -> Any:
    return message_factory.GetMessageClass(_pool.FindMessageTypeByName(f"{_PACKAGE}.{message}"))


ModelProto = _class("ModelProto")
GraphProto = _class("GraphProto")
TensorProto = _class("TensorProto")
