"""``guard serve``: a configuration on a local Ray Serve, from the command line or inside another program."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import click
import yaml

from deployments import local
from deployments.config import MODES, GrpcSettings, ServeConfig, overridden
from deployments.document import Application, Document, check_with_serve, document, http_options, read
from deployments.errors import StartFailed
from deployments.keys import Keys
from deployments.proxies import PROXIES, READY, Proxy, choose, prepare
from deployments.settings import checked
from deployments.signals import interrupt_on_signals, on_hangup, until_interrupted
from guard.errors import BadInput, BadSetting

# A 1×1 PNG: the example request needs no file.
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGNgYGAAAAAEAAH2FzhVAAAAAElFTkSuQmCC"
POLL_S = 0.1
log = logging.getLogger(__name__)
DEPLOY_S = 600.0
RECOVERY_S = 60.0


class Server:
    """A running server. url: its address. proxy: what stands in front of the replicas."""

    def __init__(self, served: Document, proxy: Proxy) -> None:
        self.proxy = proxy
        self._served = served

    @property
    def url(self) -> str:
        http = self._served.http_options
        scheme, host = "https" if http.ssl_certfile else "http", f"[{http.host}]" if ":" in http.host else http.host
        return f"{scheme}://{host}:{http.port}"

    def update(self, wanted: Document) -> None:
        """Serve ``wanted`` instead: settings and artifacts change in the running replicas, other changes take new ones.

        Raises:
            BadInput: it does not check, or an artifact cannot be loaded. StartFailed: Ray Serve refused it. The server
            goes on as it was.
        """
        if wanted.http_options != self._served.http_options:
            raise BadSetting("http_options: the address cannot change while the server runs", field="http_options")
        wanted = _checked(wanted)
        grpc = wanted.guard.grpc
        if grpc is not None and grpc != self._served.guard.grpc:
            _check_port(grpc.host, grpc.port, "--grpc-port")
        _check_room(wanted.guard)
        try:
            _deploy(wanted)
        except StartFailed:
            _submit(self._served)  # else Serve would go on trying
            raise
        self._served = wanted


@contextmanager
def running(served: Document, *, proxy: Proxy = "auto") -> Iterator[Server]:
    """Serve ``served`` on a Ray of its own while the block runs.

    Raises:
        BadArtifact: an artifact cannot be loaded; before Ray starts. BadSetting: a port is taken.
        StartFailed: Ray Serve could not bring the replicas up.
    """
    proxy = choose(proxy, https=served.http_options.ssl_certfile is not None)
    with tempfile.TemporaryDirectory(prefix="g-", dir="/tmp") as folder:  # a socket's path must be short
        prepare(proxy, Path(folder))
        served = _checked(served)
        config = served.guard
        _check_port(served.http_options.host, served.http_options.port, "--port")
        if config.grpc is not None:
            _check_port(config.grpc.host, config.grpc.port, "--grpc-port")
        try:
            with local.own_signals():
                local.start(max(int(config.replicas * config.cpus_per_replica) + 2, os.cpu_count() or 1))
            _check_room(config)
            _start_serve(served)
            yield Server(served, proxy)
        finally:
            _stop(served.mine)


def _checked(wanted: Document) -> Document:
    """``wanted``, with a mark for what each artifact holds, so that one that was fitted anew is loaded anew.

    Raises:
        BadInput: Serve would refuse it; an artifact cannot be loaded, or not on its device; a secret is missing.
    """
    import guard
    from deployments.engine.served import check_threshold

    check_with_serve(wanted)
    config = wanted.guard
    Keys.from_settings(config.keys)
    if config.grpc is not None and config.grpc.port == wanted.http_options.port:
        raise BadSetting(f"grpc.port: {config.grpc.port} is the port for HTTP; give another", field="grpc.port")
    models = []
    for model in config.models:
        try:
            loaded = guard.load(model.artifact, device=model.device)
        except (RuntimeError, AssertionError) as error:  # torch, of a device that is not there
            raise BadSetting(f"device: {model.device} cannot be used: {error}", field="device") from error
        check_threshold(model.threshold, loaded)
        if model.upstream is not None:
            model.upstream.secrets()
        models.append(model.model_copy(update={"revision": str(loaded.manifest["sha256"])[:16]}))
    marked = config.model_copy(update={"models": tuple(models)})
    return wanted.with_guard(marked.model_dump(mode="json", exclude_defaults=True))


def _check_room(config: ServeConfig) -> None:
    """Raise BadSetting if this Ray, which is as large as it was at the start, has no room for so many replicas."""
    import ray

    there = ray.cluster_resources()  # type: ignore[no-untyped-call]
    cpus, gpus = (float(there.get(name, 0.0)) for name in ("CPU", "GPU"))
    if config.replicas * config.cpus_per_replica > cpus:
        raise BadSetting(
            f"replicas: {config.replicas} of {config.cpus_per_replica:g} CPUs are more than the {cpus:g} of the Ray "
            "that was started: start the server anew",
            field="replicas",
        )
    if config.replicas * config.gpus > gpus:
        raise BadSetting(
            f"gpus_per_replica: {config.replicas} of {config.gpus:g} are more than the {gpus:g} that Ray sees: say "
            f"{gpus / config.replicas:.3g} or less, and they share",
            field="gpus_per_replica",
        )


def _start_serve(served: Document) -> None:
    from ray import serve as ray_serve
    from ray.exceptions import ActorDiedError, RayError

    from deployments import app

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        ray_serve.start(
            proxy_location=served.proxy_location,
            http_options=served.http_options.model_dump(),
            logging_config=app.QUIET,
        )
    except ActorDiedError as error:
        raise StartFailed(
            f"Ray Serve could not start: its proxy died, or was not ready within {os.environ[READY]} s, which {READY} "
            "in the environment makes longer"
        ) from error
    except (RuntimeError, RayError, TimeoutError) as error:
        if re.search(rf"\bbind\b.*:{served.http_options.port}\b", str(error)):  # taken since the first look
            _check_port(served.http_options.host, served.http_options.port, "--port")
        raise StartFailed(f"Ray Serve could not start: {_reason([str(error)])}") from error
    _deploy(served)


def _submit(served: Document) -> None:
    """Tell Serve that its state shall be what ``served`` says, as ``serve deploy`` would."""
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    # Serve's public functions deploy from Python objects alone, and restart every replica.
    cast(Any, _get_global_client()).deploy_apps(ServeDeploySchema(**served.to_serve()))


def _deploy(served: Document) -> None:
    """`_submit`, and wait until it is so."""
    from ray import serve as ray_serve

    _submit(served)
    waiting = {one.name for one in served.applications}
    failing: dict[str, float] = {}  # since when
    deadline = time.monotonic() + DEPLOY_S
    while waiting:
        time.sleep(POLL_S)
        if time.monotonic() > deadline:
            raise StartFailed(f"Ray Serve has not started {', '.join(sorted(waiting))} within {DEPLOY_S:.0f} s")
        for name, status in ray_serve.status().applications.items():
            if status.status == "RUNNING":
                waiting.discard(name)
            if name not in waiting or status.status != "DEPLOY_FAILED":
                failing.pop(name, None)
                continue
            parts = list(status.deployments.values())
            died = any(part.status_trigger == "HEALTH_CHECK_FAILED" for part in parts)  # and may come back
            if time.monotonic() - failing.setdefault(name, time.monotonic()) >= (RECOVERY_S if died else 0):
                reason = _reason([status.message, *(part.message for part in parts)])
                raise StartFailed(f"Ray Serve could not start {name}: {reason}")


def _reason(messages: list[str]) -> str:
    """What HAProxy says first, or the last error that a report of Serve's, with its nested traces, tells of."""
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    if alerts := [line for line in lines if line.startswith("[ALERT]")]:
        return alerts[0]
    errors = [line for line in lines if re.match(r"([a-z_]\w*\.)*[A-Z]\w+: (?!Traceback)", line)]
    return (errors or lines or ["its log has the reason"])[-1]


def _stop(mine: Application) -> None:
    """Put a refusal in the guard's place, wait until requests in flight have their answers, then end all of Ray.

    Also ends the processes of a start that was cut short.
    """
    import ray
    from ray import serve as ray_serve

    from deployments import app

    try:
        if ray.is_initialized() and mine.name in ray_serve.status().applications:
            ray_serve.run(app.build_closing(), name=mine.name, route_prefix=mine.route_prefix)
            deadline = time.monotonic() + app.DRAIN_S
            while set(ray_serve.status().applications[mine.name].deployments) != {app.CLOSING}:
                if time.monotonic() > deadline:
                    break
                time.sleep(0.05)
    finally:
        ray.shutdown()


def _check_port(host: str, port: int, option: str) -> None:
    """Raise BadSetting if nobody could listen at host:port."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise BadSetting(
                f"port {port} on {host} cannot be used: {error.strerror}: choose another with {option} or --host",
                field="port",
            ) from error


@click.command()
@click.argument("source", metavar="DIR|CONFIG.yaml", type=click.Path(path_type=Path))
@click.option("--mode", type=click.Choice(MODES), help="What happens to a flagged image.  [default: flag]")
@click.option("--name", help="The model's name in routes and metrics.  [default: the folder's name]")
@click.option("--host", help="Where to listen.  [default: 127.0.0.1]")
@click.option("--port", type=int, help="For HTTP.  [default: 8000]")
@click.option("--grpc-port", type=int, help="Serve gRPC as well, on this port.")
@click.option(
    "--api-keys",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Who may ask: a line each, `role key`; read again when it changes. GUARD_API_KEYS may hold some as well.",
)
@click.option("--replicas", type=int, help="Processes that each hold both networks.  [default: 1]")
@click.option(
    "--expose-scores",
    is_flag=True,
    default=None,
    help="Answers carry the score, and the p-value if there is one. They help whoever designs triggers.",
)
@click.option(
    "--on-failure",
    type=click.Choice(("open", "closed")),
    help="Without a verdict: answer unguarded (open) or refuse (closed).  [default: open]",
)
@click.option("--threshold", type=float, help="Flag below this p-value.  [default: the artifact's]")
@click.option(
    "--proxy",
    type=click.Choice(PROXIES),
    default="auto",
    show_default=True,
    help="In front of the replicas: HAProxy, where there is one, or Serve's own.",
)
@click.option("--print-config", is_flag=True, help="Print the configuration file that says the same, and end.")
def serve(source: Path, proxy: Proxy, print_config: bool, **options: Any) -> None:
    """Serve the artifact DIR, or what CONFIG.yaml says, until SIGTERM or Ctrl-C.

    SIGHUP reads CONFIG.yaml again: modes, thresholds and artifacts change in the running server. The same file works
    with `serve deploy`. GUARD_PORT, GUARD_MODE, GUARD_RESNET18_MODE and the like override it.
    """
    given = {key: value for key, value in options.items() if value is not None}
    try:
        wanted = _document(source, given)
        if print_config:
            click.echo(yaml.safe_dump(wanted.to_serve(), sort_keys=False), nl=False)
            return
        interrupt_on_signals()
        with running(wanted, proxy=proxy) as server:
            click.echo(f"guard: serving {_models(wanted)} at {server.url}, try: {_example(wanted, server)}", err=True)
            on_hangup(lambda: _reload(server, source))
            until_interrupted()
            click.echo("guard: shutting down", err=True)
    except KeyboardInterrupt:
        pass
    except SystemExit as ended:  # Ray's own handler, in the seconds in which it starts
        if ended.code != signal.SIGTERM:
            raise
    except BadInput as error:
        click.echo(f"guard serve: {error}", err=True)
        raise SystemExit(2) from error
    except StartFailed as error:
        click.echo(f"guard serve: {error}", err=True)
        raise SystemExit(1) from error


def _document(source: Path, options: dict[str, Any]) -> Document:
    """What the command line asks for: a file as it is, or the document of one artifact."""
    if source.is_file():
        if options:
            name = f"--{next(iter(options)).replace('_', '-')}"
            raise BadSetting(f"{name}: say it in {source}, or leave the file away and give the folder", field=name)
        return read(source)
    server = {key: options.pop(key) for key in ("replicas",) if key in options}
    http = http_options({key: options.pop(key) for key in ("host", "port") if key in options})
    grpc = options.pop("grpc_port", None)
    if grpc is not None:
        server["grpc"] = checked(GrpcSettings, {"host": http.host, "port": grpc}).model_dump()
    if "api_keys" in options:
        server["keys"] = {"file": str(options.pop("api_keys").resolve())}
    model = options | {"artifact": str(source.resolve())}
    config = checked(ServeConfig, overridden({"models": [model]} | server, os.environ))
    return document(config, host=http.host, port=http.port)


def _reload(server: Server, source: Path) -> None:
    if not source.is_file():
        click.echo("guard: no configuration file to read again: `guard serve CONFIG.yaml` has one", err=True)
        return
    try:
        wanted = read(source)
        server.update(wanted)
    except Exception as error:  # whatever it is, the server serves on
        click.echo(f"guard: {source} changes nothing: {error}", err=True)
        if not isinstance(error, (BadInput, StartFailed)):
            log.exception("reading %s again", source)
    else:
        click.echo(f"guard: serving {_models(wanted)}", err=True)


def _models(served: Document) -> str:
    return ", ".join(f"{model.name} in mode {model.mode}" for model in served.guard.models)


def _example(served: Document, server: Server) -> str:
    body = f'{{"instances": [{{"b64": "{PIXEL}"}}]}}'
    return f"curl -s {server.url}/v1/models/{served.guard.models[0].name}:predict -d '{body}'"


if __name__ == "__main__":
    serve()
