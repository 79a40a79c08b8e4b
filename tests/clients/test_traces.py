"""Spans reach an OTLP collector, joined over processes: request → step → layer → expert."""

import concurrent.futures
import json
import threading
import urllib.request

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from conftest import Mesh


class Sink(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps every span it is sent, with the service that sent it."""

    def __init__(self):
        self.spans = {}
        self.grown = threading.Condition()

    def Export(self, request, context):
        with self.grown:
            for resource in request.resource_spans:
                names = [a.value.string_value for a in resource.resource.attributes if a.key == "service.name"]
                for scope in resource.scope_spans:
                    for span in scope.spans:
                        self.spans[span.span_id] = (names[0], span)
            self.grown.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.fixture
def sink():
    keeper = Sink()
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(4))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(keeper, server)
    keeper.port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield keeper
    server.stop(None)


def test_one_request_is_one_trace_over_three_services(sink):
    mesh = Mesh("--otlp", f"http://127.0.0.1:{sink.port}").wait_ready()
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    body = b'{"model": "%s", "prompt": "The cat", "max_tokens": 3, "temperature": 0}'
    with urllib.request.urlopen(f"{mesh.url}/v1/models") as listed:
        name = json.load(listed)["data"][0]["id"]
    request = urllib.request.Request(
        f"{mesh.url}/v1/completions",
        data=body % name.encode(),
        headers={"content-type": "application/json", "traceparent": f"00-{trace}-00f067aa0ba902b7-01"},
    )
    urllib.request.urlopen(request).read()
    mesh.stop()

    spans = {i: s for i, s in sink.spans.items() if s[1].trace_id.hex() == trace}

    def ancestry(service, span):
        path = [f"{service.removeprefix('moemesh-')}:{span.name}"]
        while span.parent_span_id in spans:
            service, span = spans[span.parent_span_id]
            path.append(f"{service.removeprefix('moemesh-')}:{span.name}")
        return path

    paths = [ancestry(*entry) for entry in spans.values()]
    experts = [path for path in paths if path[0] == "expert-node:expert"]
    assert experts, sorted({path[0] for path in paths})
    for path in experts:
        assert path[1:4] == ["router:layer", "router:step", "router:generate"], path
        assert path[4].startswith("gateway:"), path
