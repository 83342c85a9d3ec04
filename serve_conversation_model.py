#!/usr/bin/env python3
"""Talk to a model: a page for the browser, and an API, on this machine.

    serve_conversation_model.py                                the published run (latest), else the newest
    serve_conversation_model.py --run_dir RUN                  that run
    serve_conversation_model.py --model FILE_OR_FOLDER         a .gguf file, or a merged model folder

    http://127.0.0.1:8765/            the page
    http://127.0.0.1:8765/v1          OpenAI's API: chat completions, plain and streamed
    http://127.0.0.1:8765/openapi.json describes the API

Others than this machine need a key: set CONVERSATION_API_KEY, then --host 0.0.0.0. Conversations are kept as files in
training-runs/conversations, training trees made from them in training-runs/own_trees.
Ctrl-C ends it in order. Exit status: 0 served and ended; 1 failed at work; 2 not started.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out

from conversation.errors import CommandLine, UserError, run_main
from conversation.runs.files import shown
from conversation.runs.folder import newest_run
from conversation_config import CONVERSATIONS, OWN_TREES, TRAINING_RUNS, add_device_flag, set_up_libraries

PORT = 8765
KEY_VARIABLE = "CONVERSATION_API_KEY"


def main() -> int:
    args = parse_flags()
    source = model_of(args)
    check_packages()
    from conversation.answering.answer_queue import AnswerQueue
    from conversation.answering.guard import Access
    from conversation.answering.listening import LoadingLine, listen, open_browser, run_server, url_of
    from conversation.answering.server import Service, make_app
    from conversation.runs.conversation_files import ConversationFiles

    def load():
        set_up_libraries()
        from conversation.answering.engines import open_engine

        engine = open_engine(source, args.device)
        engine.warm_up()
        return engine

    listener = listen(args.host, args.port)
    key = os.environ.get(KEY_VARIABLE, "").strip()
    access = Access(listener.getsockname()[0], key, tuple(args.allowed_host), tuple(args.allowed_origin))
    queue = AnswerQueue(load)
    conversations, own_trees = CONVERSATIONS, OWN_TREES
    if args.data_dir:
        conversations, own_trees = args.data_dir / CONVERSATIONS.name, args.data_dir / OWN_TREES.name
    service = Service(queue, ConversationFiles(conversations, own_trees), name_of(source))
    url, port = url_of(listener), listener.getsockname()[1]
    if args.port not in (0, port):
        print(f"Port {args.port} is in use; this server takes {port}.")

    loading = LoadingLine(f"Loading {shown(source)} ...")

    def say_ready() -> None:
        loading.done()
        if queue.engine:
            print(f"Device: {queue.engine.device}")
        print(f"Ready: {url}  (OpenAI's API: {url}v1; Ctrl-C ends it)", flush=True)
        if not args.no_browser and not open_browser(url):
            print("No browser was found here: open that address yourself.", flush=True)

    try:
        run_server(make_app(service, access), listener, queue, say_ready)
    finally:
        loading.end()
    print("Ended.")
    return 0


def parse_flags() -> argparse.Namespace:
    parser = CommandLine(__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--run_dir", type=Path, help="the run folder (default: latest, else the newest)")
    which.add_argument("--model", type=Path, help="a .gguf file, a merged model folder or a run folder")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=PORT, help=f"port, or the next free one; 0: any (default: {PORT})")
    parser.add_argument("--no_browser", action="store_true", help="do not open the page")
    parser.add_argument("--data_dir", type=Path, help="where conversations are kept (default: training-runs)")
    parser.add_argument(
        "--allowed_host", action="append", default=[], metavar="NAME", help="a name of this server, as a proxy gives it"
    )
    parser.add_argument(
        "--allowed_origin", action="append", default=[], metavar="ORIGIN", help="a web page that may use the API (CORS)"
    )
    add_device_flag(parser)
    args = parser.parse_args()
    if not 0 <= args.port < 2**16:
        raise UserError(f"--port must be from 0 to 65535, not {args.port}")
    return args


def model_of(args: argparse.Namespace) -> Path:
    """The run folder, merged folder or file to serve. Raises UserError when it is not there."""
    latest = TRAINING_RUNS / "latest"
    named = args.model or args.run_dir
    source: Path = named or (latest.resolve() if latest.exists() else newest_run().path)
    if not source.exists():
        raise UserError(f"there is no model at {source}", "name a run folder, a merged folder or a .gguf file")
    return source


def name_of(source: Path) -> str:
    """The model's id in the API: known before the model is loaded, and the same after an export of the run."""
    source = source.resolve()
    return source.stem if source.is_file() else source.name


def check_packages() -> None:
    """Raises UserError when the packages of the server are not installed."""
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        problem = f"the server needs the package {error.name}, which is not installed"
        raise UserError(problem, f"install it: {sys.executable} -m pip install -r requirements-use.txt") from None


if __name__ == "__main__":
    run_main(main)
