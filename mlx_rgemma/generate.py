"""The command `mlx-rgemma generate`: generate text from a prompt."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from mlx_rgemma import cli
from mlx_rgemma.errors import UserError

if TYPE_CHECKING:
    from mlx_rgemma.griffin.cache import GriffinCache
    from mlx_rgemma.griffin.model import Model
    from mlx_rgemma.sessions.session import Session

DEFAULT_PROMPT = "Once upon a time"
DEFAULT_MAX_TOKENS = 100


EXAMPLES = (
    '--prompt "Once upon a time" --temp 0.8 --seed 1',
    '--model google/recurrentgemma-2b-it --prompt "Why is the sky blue?" --max-tokens 300',
    "--prompt-file question.txt --json > answer.json",
)


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser: mlx-lm's arguments, and a few more."""
    parser = cli.make_parser(
        "mlx_rgemma.generate",
        "Generate text with RecurrentGemma, in constant memory.",
        EXAMPLES,
    )
    count = cli.int_at_least
    cli.add_model(parser).add_argument(
        "--extra-eos-token", nargs="+", default=(), help="More tokens that stop generation."
    )
    add = parser.add_argument_group("prompt").add_argument
    add(
        "--prompt",
        "-p",
        action="append",
        help="The prompt; '-' reads stdin. Repeat it to"
        f" generate for several prompts at once. Default: {DEFAULT_PROMPT!r}.",
    )
    add("--prompt-file", "-f", action="append", default=[], help="Read a prompt from a file.")
    add("--system-prompt", help="System prompt for the chat template.")
    add("--prefill-response", help="How the chat model's answer begins.")
    add("--ignore-chat-template", action="store_true", help="Use the prompt as it is.")
    add("--chat-template-config", help="JSON object with more arguments for the chat template.")
    add("--prompt-cache-file", help="State to start from, as cache_prompt saves it.")
    cli.add_sampling(parser, DEFAULT_MAX_TOKENS)
    add = cli.add_state(parser).add_argument
    add("--draft-model", help="A smaller model of the same vocabulary, for speculative decoding.")
    add(
        "--num-draft-tokens",
        type=count(1),
        default=3,
        help="Tokens that the draft model proposes at a time. Default: %(default)s.",
    )
    add(
        "--prompt-lookup",
        type=count(0),
        default=0,
        metavar="N",
        help="Without a draft model: propose N tokens at a time from the text so far.",
    )
    add = parser.add_argument_group("output").add_argument
    add(
        "--verbose",
        type=lambda text: text.lower() not in ("false", "f"),
        default=True,
        help="'False' prints the text only.",
    )
    add("--json", action="store_true", help="Print one JSON object per prompt, and nothing else.")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    args = build_parser().parse_args(argv)
    return cli.run(lambda: _generate(args), pytorch=argv is not None)


def _generate(args: argparse.Namespace) -> int:
    prompts = _read_prompts(args)
    _check_combinations(args, len(prompts))

    from mlx_rgemma.sessions.session import Session

    model, tokenizer = cli.load_model(args)
    for token in args.extra_eos_token:
        tokenizer.add_eos_token(token)
    drafting = _drafting(model, tokenizer, args)
    cache = None
    if args.prompt_cache_file is not None:
        session = Session.load(args.prompt_cache_file, model, tokenizer)
        tokens, cache = [_encode_next(session, prompts[0], args)], session.prompt_cache()
    else:
        tokens = [_encode(tokenizer, prompt, args, model.args.vocab_size) for prompt in prompts]
    if args.model is None and args.verbose and not args.json:
        _introduce(model)
    if len(prompts) == 1:
        return _generate_one(model, tokenizer, tokens[0], cache, drafting, args)
    return _generate_batch(model, tokenizer, prompts, tokens, args)


def _check_combinations(args: argparse.Namespace, prompts: int) -> None:
    """Refuse arguments that exclude each other, before anything is loaded."""
    if args.prompt_lookup and args.draft_model is not None:
        raise UserError("--prompt-lookup is for generating without a --draft-model.")
    if prompts > 1:
        if args.prompt_lookup or args.draft_model is not None:
            raise UserError("--draft-model and --prompt-lookup go with one prompt.")
        if args.prompt_cache_file is not None:
            raise UserError("--prompt-cache-file goes with one prompt.")
        if args.max_tokens == -1:
            raise UserError("--max-tokens -1 goes with one prompt.")


def _introduce(model: Model) -> None:
    """Print a note about the embedded model on stderr."""
    from mlx.utils import tree_flatten

    from mlx_rgemma import distributed

    arrays: Any = tree_flatten(model.parameters())
    if distributed.rank() == 0:
        print(
            f"Embedded demo model ({sum(x.size for _, x in arrays):,} parameters)."
            " For real answers: --model google/recurrentgemma-2b-it",
            file=sys.stderr,
        )


def _read_prompts(args: argparse.Namespace) -> list[str]:
    """Read the prompts, before the model is loaded."""
    texts = [text.replace("\\n", "\n").replace("\\t", "\t") for text in args.prompt or []]
    if "-" in texts:
        cli.refuse_stdin("--prompt -")
    if texts.count("-") > 1:
        raise UserError("--prompt - was given twice; stdin can be read once.")
    prompts = [sys.stdin.read() if text == "-" else text for text in texts]
    for path in args.prompt_file:
        try:
            with open(path, encoding="utf-8") as file:
                prompts.append(file.read())
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text ({error.reason}).") from error
    return prompts or [DEFAULT_PROMPT]


def _encode(
    tokenizer: Any,
    prompt: str,
    args: argparse.Namespace,
    vocab_size: int,
) -> list[int]:
    """Return the token ids of a prompt, in the chat template if the model has one."""
    from mlx_rgemma.generation.prompts import chat_text, encode, template_options

    if tokenizer.has_chat_template and not args.ignore_chat_template:
        turns = {
            "system": args.system_prompt,
            "user": prompt,
            "assistant": args.prefill_response,
        }
        messages = [{"role": r, "content": text} for r, text in turns.items() if text is not None]
        prompt = chat_text(tokenizer, messages, **template_options(args.chat_template_config))
    tokens: Any = encode(tokenizer, prompt, vocab_size).tolist()
    return tokens


def _encode_next(session: Session, prompt: str, args: argparse.Namespace) -> list[int]:
    """Return the token ids of a prompt that continues a state, as the next turn of a chat."""
    from mlx_rgemma.generation.prompts import template_options
    from mlx_rgemma.sessions.conversation import Conversation

    conversation = Conversation(
        session,
        system_prompt=args.system_prompt,
        use_template=not args.ignore_chat_template,
        options=template_options(args.chat_template_config),
    )
    if not conversation.template:
        return session.encode(prompt)
    return session.encode(conversation.turn(prompt) + (args.prefill_response or ""))


def _drafting(model: Model, tokenizer: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of speculative decoding; empty without it."""
    from mlx_rgemma.checkpoints.load import load
    from mlx_rgemma.generation.speculative import SpeculationStats, check_vocabulary

    if args.draft_model is None:
        if not args.prompt_lookup:
            return {}
        return {"prompt_lookup": args.prompt_lookup, "speculation_stats": SpeculationStats()}
    draft_model, draft_tokenizer = load(args.draft_model, dtype=args.dtype, window=args.window)
    check_vocabulary(model, draft_model, tokenizer, draft_tokenizer)
    return {
        "draft_model": draft_model,
        "num_draft_tokens": args.num_draft_tokens,
        "speculation_stats": SpeculationStats(),
    }


def _sampling(
    model: Model, tokenizer: Any, args: argparse.Namespace, *, drafting: bool = False
) -> dict[str, Any]:
    """Return the sampler and the logits processors, by name."""
    from mlx_rgemma.distributed.group import synchronized_sampler
    from mlx_rgemma.generation.options import SamplingOptions

    options = SamplingOptions.of(vars(args))
    sampler, processors = options.functions(tokenizer, model.args.vocab_size, speculative=drafting)
    return {
        "sampler": sampler if drafting else synchronized_sampler(sampler),
        "logits_processors": processors,
    }


def _generate_one(
    model: Model,
    tokenizer: Any,
    tokens: list[int],
    cache: list[GriffinCache] | None,
    drafting: dict[str, Any],
    args: argparse.Namespace,
) -> int:
    import json

    from mlx_rgemma.generation.api import generate, stream_generate
    from mlx_rgemma.generation.progress import prompt_progress
    from mlx_rgemma.griffin.cache import state_nbytes

    cache = cache or model.make_cache()
    options: dict[str, Any] = {
        "max_tokens": args.max_tokens,
        "stop": args.stop,
        "prompt_cache": cache,
        "prefill_step_size": args.prefill_step_size,
        "prompt_progress_callback": prompt_progress(args.prefill_step_size),
        **_sampling(model, tokenizer, args, drafting=bool(drafting)),
        **drafting,
    }
    if not args.json:
        text = generate(model, tokenizer, tokens, verbose=args.verbose, **options)
        if not args.verbose:
            print(text)
        return 0
    pieces = []
    for response in stream_generate(model, tokenizer, tokens, **options):
        pieces.append(response.text)
    answer = {
        "text": "".join(pieces),
        "finish_reason": response.finish_reason,
        "prompt_tokens": response.prompt_tokens,
        "prompt_tps": response.prompt_tps,
        "generation_tokens": response.generation_tokens,
        "generation_tps": response.generation_tps,
        "peak_memory_gb": response.peak_memory,
        "state_bytes": state_nbytes(cache),
    }
    if drafting:
        stats = drafting["speculation_stats"]
        answer |= {"acceptance_rate": stats.acceptance_rate, "passes": stats.passes}
    print(json.dumps(answer))
    return 0


def _generate_batch(
    model: Model,
    tokenizer: Any,
    prompts: list[str],
    tokens: list[list[int]],
    args: argparse.Namespace,
) -> int:
    import json

    from mlx_rgemma.generation.batch import batch_generate
    from mlx_rgemma.griffin.cache import state_nbytes

    result = batch_generate(
        model,
        tokenizer,
        tokens,
        max_tokens=args.max_tokens,
        stop=args.stop,
        prefill_step_size=args.prefill_step_size,
        **_sampling(model, tokenizer, args),
    )
    stats = result.stats
    state_bytes = state_nbytes(model.make_cache())
    for i, text in enumerate(result.texts):
        if args.json:
            answer = {
                "text": text,
                "finish_reason": result.finish_reasons[i],
                "prompt_tokens": len(tokens[i]),
                "prompt_tps": stats.prompt_tps,
                "generation_tokens": len(result.token_ids[i]),
                "generation_tps": stats.generation_tps,
                "peak_memory_gb": stats.peak_memory,
                "state_bytes": state_bytes,
            }
            print(json.dumps(answer))
        elif args.verbose:
            shown = prompts[i] if len(prompts[i]) < 60 else prompts[i][:57] + "..."
            print(f"{'=' * 10} {shown!r}\n{text}")
        else:
            print(text)
    if args.verbose and not args.json:
        print(
            f"{'=' * 10}\n"
            f"Prompt: {stats.prompt_tokens} tokens, {stats.prompt_tps:.3f} tokens-per-sec\n"
            f"Generation: {stats.generation_tokens} tokens,"
            f" {stats.generation_tps:.3f} tokens-per-sec\n"
            f"Peak memory: {stats.peak_memory:.3f} GB\n"
            f"State: {len(prompts)} x {state_bytes / 1e6:.3f} MB, at any length"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
