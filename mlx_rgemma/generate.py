"""The command `python -m mlx_rgemma.generate`: text from a prompt."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from mlx_rgemma import command_line

if TYPE_CHECKING:
    from mlx_rgemma.griffin.cache import GriffinCache
    from mlx_rgemma.griffin.model import Model
    from mlx_rgemma.session import Session

DEFAULT_PROMPT = "Once upon a time"
DEFAULT_MAX_TOKENS = 100


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments: mlx-lm's, and a few more."""
    parser = argparse.ArgumentParser(
        prog="mlx_rgemma.generate",
        description="Generate text with RecurrentGemma, in constant memory.",
    )
    count, number = command_line.count, command_line.number
    add = parser.add_argument
    command_line.add_model(parser)
    add("--extra-eos-token", nargs="+", default=(), help="More tokens that stop generation.")
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
    add(
        "--max-tokens",
        "-m",
        type=count(1, unlimited=True),
        default=DEFAULT_MAX_TOKENS,
        help="Tokens to generate at most; -1 for no limit. Default: %(default)s.",
    )
    add("--temp", type=number(0), default=0.0, help="Sampling temperature. Default: 0, greedy.")
    add("--top-p", type=number(0, 1), default=1.0, help="Sampling top-p.")
    add("--min-p", type=number(0, 1), default=0.0, help="Sampling min-p.")
    add("--top-k", type=count(0), default=0, help="Sampling top-k; 0 for all.")
    add("--min-tokens-to-keep", type=count(1), default=1, help="Tokens that min-p keeps.")
    add("--repetition-penalty", type=number(0), help="Penalty for tokens of the last stretch.")
    add(
        "--repetition-context-size",
        type=count(1),
        default=20,
        help="How far back the penalty looks. Default: %(default)s.",
    )
    add("--stop", action="append", default=[], help="Text that ends the generation; repeatable.")
    add("--seed", type=int, help="Seed of the random numbers.")
    command_line.add_state(parser)
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
    add("--prompt-cache-file", help="State to start from, as cache_prompt saves it.")
    add(
        "--verbose",
        type=lambda text: text.lower() not in ("false", "f"),
        default=True,
        help="'False' prints the text only.",
    )
    add("--json", action="store_true", help="Print one JSON object a prompt, and nothing else.")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = build_parser().parse_args(argv)
    return command_line.run(lambda: _generate(args), pytorch=argv is not None)


def _generate(args: argparse.Namespace) -> int:
    prompts = _read_prompts(args)

    from mlx_rgemma.errors import UserError
    from mlx_rgemma.session import Session

    model, tokenizer = command_line.load_model(args)
    for token in args.extra_eos_token:
        tokenizer.add_eos_token(token)
    drafting = _drafting(model, tokenizer, args)
    if drafting and len(prompts) > 1:
        raise UserError("--draft-model and --prompt-lookup go with one prompt.")
    cache = None
    if args.prompt_cache_file is not None:
        if len(prompts) > 1:
            raise UserError("--prompt-cache-file goes with one prompt.")
        session = Session.load(args.prompt_cache_file, model, tokenizer)
        tokens, cache = [_encode_next(session, prompts[0], args)], session.prompt_cache()
    else:
        tokens = [_encode(tokenizer, prompt, args, model.args.vocab_size) for prompt in prompts]
    if len(prompts) == 1:
        return _generate_one(model, tokenizer, tokens[0], cache, drafting, args)
    return _generate_batch(model, tokenizer, prompts, tokens, args)


def _read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts, before anything slow is done."""
    from mlx_rgemma.errors import UserError

    texts = [text.replace("\\n", "\n").replace("\\t", "\t") for text in args.prompt or []]
    if "-" in texts:
        command_line.refuse_stdin("--prompt -")
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
    """Token ids of a prompt, in the chat template where the model has one."""
    from mlx_rgemma.generation.single import apply_chat_template, encode

    if tokenizer.has_chat_template and not args.ignore_chat_template:
        prompt = apply_chat_template(
            tokenizer,
            prompt,
            system_prompt=args.system_prompt,
            response=args.prefill_response,
            config=args.chat_template_config,
        )
    tokens: Any = encode(tokenizer, prompt, vocab_size).tolist()
    return tokens


def _encode_next(session: Session, prompt: str, args: argparse.Namespace) -> list[int]:
    """Token ids of a prompt that goes on from a state, in the chat template as its next turn."""
    from mlx_rgemma.conversation import Conversation
    from mlx_rgemma.generation.single import template_options

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
    """What speculative decoding needs; nothing where it is not asked for."""
    from mlx_rgemma.checkpoints import load
    from mlx_rgemma.errors import UserError
    from mlx_rgemma.generation.speculation import SpeculationStats, check_vocabulary

    if args.draft_model is None:
        if not args.prompt_lookup:
            return {}
        return {"prompt_lookup": args.prompt_lookup, "speculation_stats": SpeculationStats()}
    if args.prompt_lookup:
        raise UserError("--prompt-lookup is for generating without a --draft-model.")
    draft_model, draft_tokenizer = load(args.draft_model, dtype=args.dtype, window=args.window)
    check_vocabulary(model, draft_model, tokenizer, draft_tokenizer)
    return {
        "draft_model": draft_model,
        "num_draft_tokens": args.num_draft_tokens,
        "speculation_stats": SpeculationStats(),
    }


def _sampling(args: argparse.Namespace, *, drafting: bool = False) -> tuple[Any, list[Any]]:
    from mlx_rgemma.distributed.membership import agreed
    from mlx_rgemma.generation.sampling import Sampler

    make: Any = Sampler
    if args.temp and not drafting:
        from mlx_lm.sample_utils import make_sampler as make
    sampler = make(args.temp, args.top_p, args.min_p, args.min_tokens_to_keep, top_k=args.top_k)
    processors = []
    if args.repetition_penalty is not None:
        from mlx_lm.sample_utils import make_logits_processors

        processors = make_logits_processors(
            repetition_penalty=args.repetition_penalty,
            repetition_context_size=args.repetition_context_size,
        )
    return sampler if drafting else agreed(sampler), processors


def _generate_one(
    model: Model,
    tokenizer: Any,
    tokens: list[int],
    cache: list[GriffinCache] | None,
    drafting: dict[str, Any],
    args: argparse.Namespace,
) -> int:
    import json

    from mlx_rgemma.generation.single import generate, stream_generate
    from mlx_rgemma.griffin.cache import state_nbytes

    sampler, processors = _sampling(args, drafting=bool(drafting))
    cache = cache or model.make_cache()
    options: dict[str, Any] = {
        "max_tokens": args.max_tokens,
        "stop": args.stop,
        "prompt_cache": cache,
        "sampler": sampler,
        "logits_processors": processors,
        "prefill_step_size": args.prefill_step_size,
        "prompt_progress_callback": _progress(args.prefill_step_size),
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

    from mlx_rgemma.errors import UserError
    from mlx_rgemma.generation.batch import batch_generate
    from mlx_rgemma.griffin.cache import state_nbytes

    if args.max_tokens == -1:
        raise UserError("--max-tokens -1 goes with one prompt.")
    sampler, processors = _sampling(args)
    result = batch_generate(
        model,
        tokenizer,
        tokens,
        max_tokens=args.max_tokens,
        stop=args.stop,
        sampler=sampler,
        logits_processors=processors,
        prefill_step_size=args.prefill_step_size,
    )
    state_bytes = state_nbytes(model.make_cache())
    for i, text in enumerate(result.texts):
        if args.json:
            answer = {
                "text": text,
                "finish_reason": result.finish_reasons[i],
                "prompt_tokens": len(tokens[i]),
                "generation_tokens": len(result.token_ids[i]),
                "state_bytes": state_bytes,
            }
            print(json.dumps(answer))
        elif args.verbose:
            shown = prompts[i] if len(prompts[i]) < 60 else prompts[i][:57] + "..."
            print(f"{'=' * 10} {shown!r}\n{text}")
        else:
            print(text)
    if args.verbose and not args.json:
        stats = result.stats
        print(
            f"{'=' * 10}\n"
            f"Prompt: {stats.prompt_tokens} tokens, {stats.prompt_tps:.3f} tokens-per-sec\n"
            f"Generation: {stats.generation_tokens} tokens,"
            f" {stats.generation_tps:.3f} tokens-per-sec\n"
            f"Peak memory: {stats.peak_memory:.3f} GB\n"
            f"State: {len(prompts)} x {state_bytes / 1e6:.3f} MB, at any length"
        )
    return 0


def _progress(step_size: int) -> Any:
    """A counter on stderr while a prompt of more than one chunk is read."""

    def show(done: int, total: int) -> None:
        if total > step_size and sys.stderr.isatty():
            end = "\r\033[K" if done >= total else ""
            print(f"\rPrompt: {done}/{total} tokens{end}", end="", file=sys.stderr, flush=True)

    return show


if __name__ == "__main__":
    sys.exit(main())
