"""What a user can do about a site that was left as it was: a sentence for each reason that the model's code can answer."""

from __future__ import annotations

# How a reason begins, and what would let the site be replaced. Reasons that only a wider kernel could answer have no row.
ADVICE = {
    "the attention weights are returned": (
        "Do not ask for them (output_attentions=False): a fused kernel never has them in memory."
    ),
    "the attention weights are also read by": (
        "Only the product with the values may read the weights. Drop the other reader, or take it out of the compiled model."
    ),
    "the attention weights are dropped at random": (
        "For inference, call model.eval(). For training, drop weights right after a softmax that nothing else reads."
    ),
    "the scores are dropped at random": (
        "For inference, call model.eval(). For training, drop the weights after the softmax, as most models do."
    ),
    "the weights are changed between the exponential": (
        "Between softmax and values only views and casts may stand: move the operation to the scores or to the result."
    ),
    "something is added to the attention weights": (
        "Multiply both with the values by themselves: (weights + x) @ v = weights @ v + x @ v."
    ),
    "the scores of different heads are mixed": (
        "They are one product over joined features: for head g, the queries of all heads h times m[h, g], joined along the"
        " features, with the keys of all heads, joined likewise. That can be replaced up to 512 features."
    ),
    "the weights of different heads are mixed": (
        "A kernel computes each head by itself and never has the weights of another. Mixing the results of heads, or their"
        " values, would not be in the way; it is another function."
    ),
    "the scores are put together from parts of one product": (
        "Write a window as a mask of all scores, as in scores.masked_fill((i - j).abs() > w, -inf): what is masked is not"
        " computed."
    ),
    "the softmax runs over another dimension": (
        "If this is not meant, give softmax the dimension of the keys, over which the values are summed."
    ),
    "the product with the values has something added": "Add it to the product in a statement of its own.",
    "the weights are divided by their sum, but may be of either sign": (
        "Divide by the sum of their magnitudes, w.abs().sum(-1, keepdim=True), as retention does."
    ),
    "the weights are divided by their sum, but are no exponentials": (
        "Relu, sigmoid, powers, products of positive features may be divided so."
        " If they are a plain product of features and no mask is in between, multiply in the other order:"
        " f(q) @ (f(k).mT @ v) / (f(q) @ f(k).sum(-2, keepdim=True).mT) has no weights for each pair."
    ),
    "the weights are made of": (
        "Two products are one over joined features: q1 @ k1 + q2 @ k2 = cat([q1, q2], -1) @ cat([k1, k2], -2)."
    ),
    "the head size is": "More heads of a smaller size would fit.",
    "the value head size is": "More heads of a smaller size would fit.",
    "the head size is not a fixed number": "Fix that dimension: torch._dynamo.mark_static(tensor, dim).",
    "the value head size is not a fixed number": "Fix that dimension: torch._dynamo.mark_static(tensor, dim).",
    "it takes a number that may change from call to call": (
        "Make it a constant of the model, or compile with dynamic=False. Sums, products and the like of it may change."
    ),
    "no tile fits": "Smaller heads would fit, or float16 or bfloat16, or another device (--target).",
    "kernels do not compute in": "Compute in float32, bfloat16 or float16: for example model.to(torch.float32).",
    "a value between the two products is written in place": (
        "Write x = x.masked_fill(...) for x.masked_fill_(...), x = x + y for x += y."
    ),
    "the result is written in place": "Write x = x + y for x += y.",
    "an input is written in place": "Write to a copy, or move the write behind the attention.",
    "an input that the backward needs is written": "Write to a copy; or, without training, run under torch.no_grad().",
    "a part of it is detached from gradients": (
        "Take detach() or no_grad() away there; or, without training, run all of the model under torch.no_grad()."
    ),
    "its kernel failed": "Please report it. attngen minify writes a script that shows it.",
    "internal error": "Please report it. attngen minify writes a script that shows it.",
}


def on(reason: str) -> str:
    """The advice for a reason; empty if there is nothing the user can do."""
    known = [beginning for beginning in ADVICE if reason.startswith(beginning)]
    return ADVICE[max(known, key=len)] if known else ""
