"""``fastlora chat``: talk to a model with its adapters, switch between them, or ask all at once.

All adapters share one conversation. A line that begins with / is a command; /help lists the
commands.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from fastlora.commands import models
from fastlora.commands.options import Option, parse_options
from fastlora.integrations.transformers import end_token_ids
from fastlora.serve.prompt_tokenizer import PromptTokenizer, check_no_surrogates
from fastlora.serve.sampling import SamplingParams
from fastlora.validation import CheckpointError, ConfigError, near_names

BASE = "base"
_INT64 = 2**63
_HELP = """\
/adapter NAME   answer with this adapter; /adapter base answers with the base model
/adapters       list the adapters; a star marks the one that answers
/compare        answer with every adapter and the base model, in one batch; repeat to turn it off
/system TEXT    set the system prompt and start a new conversation
/reset          start a new conversation
/quit           quit; the end of the input also quits"""


OPTIONS = (
    *models.OPTIONS,
    Option(
        "--adapter",
        "a PEFT adapter folder, or a folder of them; repeatable. The first adapter answers",
        metavar="[NAME=]DIR",
        more={"action": "append"},
    ),
    Option(
        "--prompt",
        "answer this prompt and quit; repeat for several turns of one conversation. With several "
        "adapters, each answer starts with the name of the adapter",
        metavar="TEXT",
        more={"action": "append"},
    ),
    Option("--compare", "answer with every adapter and with the base model", False),
    Option("--system", "system prompt", metavar="TEXT"),
    Option(
        "--plain",
        "continue each message as plain text, without a chat template or history",
        False,
    ),
    Option("--max-new-tokens", "maximum number of tokens in an answer", 256, 1),
    Option("--temperature", "sampling temperature; 0 always takes the most likely token", 0.7, 0),
    Option(
        "--top-p",
        "sample from the most likely tokens with a total probability of P",
        0.9,
        metavar="P",
    ),
    Option("--seed", "random seed for sampling", 0),
)


def parse_adapter_folders(given: Sequence[str]) -> dict[str, Path]:
    """Parse the adapter folders given on the command line into a dict keyed by adapter name.

    Args:
        given: Values of ``--adapter``: folders, or ``NAME=FOLDER``.

    Raises:
        CheckpointError: A folder is missing, or neither the folder nor any of its subfolders
            contains an adapter.
        ConfigError: Two adapters have the same name, or an adapter has the name of the base model
            or an empty name.
    """
    from fastlora.model.adapter_files import CONFIG_NAME

    found: dict[str, Path] = {}
    for text in given:
        name, equals, rest = text.partition("=")
        if Path(text).expanduser().is_dir():  # the name of a folder may contain =
            name, equals, rest = text, "", ""
        path = Path(rest if equals else text).expanduser()
        folders = {(name if equals else path.resolve().name): path}
        if not (path / CONFIG_NAME).is_file() and path.is_dir():
            inner = sorted(p for p in path.iterdir() if (p / CONFIG_NAME).is_file())
            if inner and not equals:
                folders = {p.name: p for p in inner}
        for own, folder in folders.items():
            if not (folder / CONFIG_NAME).is_file():
                raise CheckpointError(
                    f"{folder}: not an adapter folder; expected it to contain {CONFIG_NAME}"
                )
            if not own:
                raise ConfigError(f"--adapter {text}: the name is empty; pass NAME={folder}")
            if own in found or own == BASE:
                raise ConfigError(
                    f"--adapter {folder}: the name {own!r} is already in use; pass NAME={folder} "
                    "to give this adapter another name"
                )
            found[own] = folder
    return found


class Chat:
    """A chat session on the command line.

    The session holds a model with its adapters, and the messages of the conversation. The model is
    in evaluation mode. Initially, the first adapter answers, or the base model if there are no
    adapters.

    Args:
        model: The model with its adapters.
        tokenizer: The tokenizer of the model.
        names: Dict that maps the name of each adapter to its name in the model. The names differ
            because a name in the model can have no dots.
        out: Stream for answers and messages.
        plain: Whether to continue each message as a text by itself, without a chat template or
            earlier messages.
        system: The system prompt.
        sampling: Further arguments of ``generate``.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        names: Mapping[str, str],
        out: TextIO,
        *,
        plain: bool = False,
        system: str | None = None,
        **sampling: Any,
    ) -> None:
        self.model, self.tokenizer, self.out, self.sampling = model, tokenizer, out, sampling
        self._prompts = PromptTokenizer(tokenizer)
        self.plain = plain or not getattr(tokenizer, "chat_template", None)
        self.names = dict(names)
        self.active_adapter = next(iter(self.names), BASE)
        self.system, self.compares_adapters = system, False
        self.shows_name = False  # whether a single answer starts with the name of its adapter
        self.messages: list[dict[str, str]] = []

    def handle_line(self, line: str) -> bool:
        """Handle a line that the user enters, and return whether the chat continues.

        The line is a message to answer or a command to run.
        """
        try:
            check_no_surrogates("the line", line)
        except ConfigError as error:
            self._print(str(error))
            return True
        word, _, rest = line.strip().partition(" ")
        if word in ("/quit", "/exit"):
            return False
        if word == "/help":
            self._print(_HELP)
        elif word == "/adapters":
            for name in [*self.names, BASE]:
                self._print(f"{'*' if name == self.active_adapter else ' '} {name}")
        elif word == "/adapter":
            self.select_adapter(rest.strip())
        elif word == "/compare":
            self.compares_adapters = not self.compares_adapters
            self._print(f"comparison is {'on' if self.compares_adapters else 'off'}")
        elif word == "/system" and self.plain:
            self._print("a system prompt needs a chat template")
        elif word in ("/reset", "/system"):
            self.system = rest.strip() or None if word == "/system" else self.system
            self.messages = []
            self._print("started a new conversation")
        elif word.startswith("/"):
            self._print(f"unknown command {word}\n{_HELP}")
        elif word:
            self.try_answer(line.strip())
        return True

    def select_adapter(self, name: str) -> None:
        """Select the adapter to use for subsequent answers.

        The name may also be that of the base model. Unknown names are reported.
        """
        if name in self.names or name == BASE:
            self.active_adapter = name
            self._print(f"{name} answers now")
        else:
            known = [*self.names, BASE]
            self._print(
                f"no adapter {name!r}; expected one of {', '.join(known)}{near_names(name, known)}"
            )

    def try_answer(self, message: str) -> bool:
        """Answer a message, and return whether an answer was generated.

        One answer is streamed, or the answers of all adapters are shown in turn. The conversation
        continues with the answer of the chosen adapter. A message that does not fit the model, or
        that the chat template rejects, is reported and dropped.
        """
        before = list(self.messages)
        self.messages.append({"role": "user", "content": message})
        ids = self._truncated_conversation_ids()
        if ids is None:
            self.messages = before
            return False
        if self.compares_adapters:
            answers = self._answer_with_all(ids, [*self.names, BASE])
            for name, answer in answers.items():
                self._print(f"[{name}] {answer}")
            answer = answers[self.active_adapter]
        else:
            answer = self._stream_answer(ids)
        self.messages.append({"role": "assistant", "content": answer})
        if self.plain:
            self.messages = []
        return True

    def _conversation_ids(self) -> torch.Tensor:
        """Return the conversation's token ids.

        The result is an int64 tensor of shape ``[1, T]``. Raises `ConfigError` if the chat template
        rejects the conversation.
        """
        if self.plain:
            ids = self._prompts.tokenize_text(self.messages[-1]["content"])
        else:
            first = [{"role": "system", "content": self.system}] if self.system else []
            ids = self._prompts.tokenize_messages([*first, *self.messages])
        return torch.tensor([ids], device=self.model.device)

    def _truncated_conversation_ids(self) -> torch.Tensor | None:
        """Return the conversation's token ids, truncated to fit the model's context length.

        The oldest exchanges are deleted if the conversation would not leave room for the answer.
        Returns None, after a message to the user, if the last message does not fit or the chat
        template rejects the conversation.
        """
        limit = getattr(self.model.config, "max_position_embeddings", None)
        room = None if limit is None else limit - self.sampling["max_new_tokens"]
        try:
            ids, forgotten = self._conversation_ids(), 0
        except ConfigError as error:
            self._print(str(error))
            return None
        while room is not None and ids.shape[1] > room and len(self.messages) > 2:
            del self.messages[:2]
            forgotten += 1
            ids = self._conversation_ids()
        if room is not None and ids.shape[1] > room:
            self._print(
                f"the message has {ids.shape[1]} tokens; the model supports {limit}, of which "
                f"{self.sampling['max_new_tokens']} are reserved for the answer"
            )
            return None
        if forgotten:
            self._print(f"(the first {forgotten} exchanges no longer fit and were removed)")
        return ids

    def _stream_answer(self, ids: torch.Tensor) -> str:
        from transformers import TextStreamer

        chat, pieces = self, []

        class Streamer(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                pieces.append(text)
                chat.out.write(text + ("\n" if stream_end else ""))
                chat.out.flush()

        streamer = Streamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        if self.shows_name:
            self.out.write(f"[{self.active_adapter}] ")
        try:
            self._generate(ids, [self.active_adapter], streamer=streamer)
        except KeyboardInterrupt:  # the user stops this answer
            self._print(" ...")
        return "".join(pieces).strip()

    def _answer_with_all(self, ids: torch.Tensor, names: Sequence[str]) -> dict[str, str]:
        made = self._generate(ids.expand(len(names), -1), names)[:, ids.shape[1] :]
        texts = self.tokenizer.batch_decode(made, skip_special_tokens=True)
        return {name: text.strip() for name, text in zip(names, texts, strict=True)}

    def _generate(self, ids: torch.Tensor, names: Sequence[str], **options: Any) -> torch.Tensor:
        if self.names:
            options["adapter_names"] = [self.names.get(name) for name in names]
        made: torch.Tensor = self.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), **self.sampling, **options
        )
        return made

    def _print(self, text: str) -> None:
        self.out.write(f"{text}\n")
        self.out.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Parse ``argv``, run the chat, and return the exit code."""
    text = "Chat with a model and its adapters: switch between them, or ask all of them at once."
    args = parse_options("fastlora chat", text, OPTIONS, argv)
    if args.prompt and not all(prompt.strip() for prompt in args.prompt):
        raise ConfigError("--prompt must not be empty")
    for flag, texts in (("--prompt", args.prompt or ()), ("--system", [args.system or ""])):
        for given in texts:
            check_no_surrogates(flag, given)
    if not -_INT64 <= args.seed < _INT64:
        raise ConfigError(f"--seed must be between {-_INT64} and {_INT64 - 1}, got {args.seed}")
    if not 0.0 < args.top_p <= 1.0:
        raise ConfigError(f"--top-p must be greater than 0 and at most 1, got {args.top_p}")
    folders = parse_adapter_folders(args.adapter or ())
    model, tokenizer, names = _load_adapted_model_and_tokenizer(args, folders)
    torch.manual_seed(args.seed)
    sampling: dict[str, Any] = {"do_sample": False}
    if not SamplingParams(temperature=args.temperature).greedy:
        sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p}
        sampling["top_k"] = 0  # transformers would sample from the 50 most likely tokens
    chat = Chat(
        model,
        tokenizer,
        names,
        sys.stdout,
        plain=args.plain,
        system=args.system,
        max_new_tokens=args.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        **sampling,
    )
    chat.compares_adapters = args.compare
    # In a terminal, the prompt shows the name.
    chat.shows_name = len(folders) > 1 and bool(args.prompt or not sys.stdin.isatty())
    if args.system is not None and chat.plain:
        raise ConfigError(
            "--system needs a chat template; remove it, or use a model that has a chat template"
        )
    if args.prompt:
        answered = [chat.try_answer(prompt) for prompt in args.prompt]
        return int(not all(answered))
    for line in _read_user_lines(chat):
        if not chat.handle_line(line):
            break
    return 0


def _load_adapted_model_and_tokenizer(
    args: argparse.Namespace, folders: dict[str, Path]
) -> tuple[Any, Any, dict[str, str]]:
    """Load the model with its adapters, the tokenizer, and the names of the adapters in the model.

    The result is a tuple (model, tokenizer, names). The dict ``names`` maps the names of the
    adapters to their names in the model. The model is in evaluation mode. Of its generation config,
    only the EOS tokens remain, so that ``generate`` samples as ``fastlora serve`` does.
    """
    from transformers import GenerationConfig

    import fastlora

    model, tokenizer = models.load_base_model_and_tokenizer(args)
    ends = sorted(end_token_ids(model, tokenizer))
    model.generation_config = GenerationConfig(eos_token_id=ends or None)
    adapted: Any = None
    names = {name: f"{name.replace('.', '_')} {i}" for i, name in enumerate(folders)}
    for name, folder in folders.items():
        if adapted is None:
            adapted = fastlora.LoraModel.from_pretrained(model, folder, names[name])
        else:
            adapted.load_adapter(folder, names[name])
    return (model if adapted is None else adapted).eval(), tokenizer, names


def _read_user_lines(chat: Chat) -> Iterator[str]:
    """Yield the lines that the user types, until the end of the input.

    The input comes from the terminal or a pipe.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - arrow keys in input()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # `Chat` reports what is not UTF-8
    terminal = sys.stdin.isatty()
    if terminal:
        how = "each message is continued as plain text" if chat.plain else "one conversation"
        names = ", ".join([*chat.names, BASE])
        sys.stdout.write(
            f"{chat.active_adapter} answers (available: {names}); {how}. Type /help for commands.\n"
        )
    while True:
        try:
            yield input(f"{chat.active_adapter}> " if terminal else "")
        except EOFError:
            return


if __name__ == "__main__":
    sys.exit(main())
