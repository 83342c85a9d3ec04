"""Write how readers went on into the confidences of conversation trees:

    python -m scripts.observed_confidences training-runs/own_trees            shows what was observed, changes nothing
    python -m scripts.observed_confidences training-runs/own_trees --write    writes it, with the number of readers

A confidence is the share of the readers who picked this follow-up, of those who went on from the node. One conversation
on the server's page is one reader. Nodes with fewer readers than --min_readers stay as they are.
"""

from __future__ import annotations

from pathlib import Path

from conversation.data.conversations import Conversation, ConversationError, parse_conversation
from conversation.data.observed_shares import Observed, observe, with_shares
from conversation.data.trees import Tree, format_tree, parse_tree, read_trees
from conversation.errors import CommandLine, UserError, run_main
from conversation.format import strict_json
from conversation.runs.files import shown, write_atomically
from conversation_config import CONVERSATIONS

MIN_READERS = 5


def main() -> int:
    parser = CommandLine(__doc__, prog="scripts.observed_confidences")
    parser.add_argument("trees", type=Path, help="folder of conversation trees")
    parser.add_argument(
        "--conversations", type=Path, default=CONVERSATIONS, help="folder that the server keeps them in"
    )
    parser.add_argument(
        "--min_readers", type=int, default=MIN_READERS, help=f"readers that a node needs (default: {MIN_READERS})"
    )
    parser.add_argument("--write", action="store_true", help="change the trees' files")
    args = parser.parse_args()
    if args.min_readers < 1:
        raise UserError(f"--min_readers must be at least 1, not {args.min_readers}")
    conversations = read_conversations(args.conversations)
    nodes = readers = 0
    for tree in read_trees(args.trees):
        found = {name: each for name, each in observe(tree, conversations).items() if each.readers >= args.min_readers}
        if not found:
            continue
        nodes, readers = nodes + len(found), max(readers, *(each.readers for each in found.values()))
        print(f"{tree.domain}/{tree.name}: {tree.question}")
        for name, each in found.items():
            print(f"  {name}, {each.readers} readers: {comparison(tree, name, each)}")
        if args.write:
            write(args.trees / tree.domain / f"{tree.name}.json", found, args.min_readers)
    print(
        f"{len(conversations)} conversations; {nodes} nodes with at least {args.min_readers} readers, at most {readers}"
    )
    if nodes and not args.write:
        print("Nothing is changed yet: --write writes it into the trees.")
    return 0


def read_conversations(folder: Path) -> list[Conversation]:
    """Every conversation of the server's folder. Raises UserError when there is none, and for a broken file."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            found.append(parse_conversation(strict_json.loads(strict_json.decode_utf8(path.read_bytes()))))
        except (ConversationError, strict_json.JsonError) as error:
            raise UserError(f"{shown(path)} is broken: {error}", "correct it, or move it away") from None
    if not found:
        raise UserError(f"there is no conversation in {shown(folder)}", "serve_conversation_model.py keeps them there")
    return found


def comparison(tree: Tree, name: str, found: Observed) -> str:
    """The choices of a node with the confidence before and the share observed."""
    choices = tree.nodes[name].follow_ups
    return "; ".join(f"{c.text} {c.confidence} -> {s:.2f}" for c, s in zip(choices, found.shares, strict=True))


def write(path: Path, found: dict[str, Observed], min_readers: int) -> None:
    """Write the shares into a tree's file, in the layout that it has."""
    text = strict_json.decode_utf8(path.read_bytes())
    content = with_shares(strict_json.loads(text), found, min_readers)
    data = format_tree(content, spread='"texts": [\n' in text.replace("\r\n", "\n")).encode()
    parse_tree(data, path.stem, path.parent.name)
    write_atomically(path, data)


if __name__ == "__main__":
    run_main(main)
