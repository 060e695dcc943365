"""The app's layout in Gradio, and which button calls which function of `actions.py`.

Whatever a visitor chooses is session state (`gr.State`), so that two visitors never mix; the model
is shared, and locked for the time of a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qwen_scope_lens.app.actions import CUSTOM, FORMS, LEFT_OUT, PRESETS, Actions
from qwen_scope_lens.app.workbench import Workbench
from qwen_scope_lens.extras import require
from qwen_scope_lens.steering.plan import OPERATIONS

__all__ = ["STYLE", "make_app"]

STYLE = """
.gradio-container { max-width: 1360px !important; margin: 0 auto !important; }
textarea, td span, .tokens bdi { unicode-bidi: plaintext; text-align: start; }
footer { display: none !important; }
.tokens { display: flex; flex-wrap: wrap; gap: .25rem; margin: .2rem 0 .6rem; }
.tokens bdi { font-family: ui-monospace, monospace; font-size: .85em; padding: .05rem .35rem;
  border-radius: 5px; background: var(--background-fill-secondary); white-space: pre; }
"""

SAVE = """(text) => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], {type: "application/json"}));
  link.download = "plan.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}"""
LOAD = """() => new Promise((done) => {
  const input = document.createElement("input");
  input.type = "file";
  input.accept = ".json";
  input.oncancel = () => done("");
  input.onchange = () => {
    const file = input.files[0];
    if (!file) done("");
    else if (file.size > 500000) done("too long for a plan");
    else file.text().then(done, () => done("cannot be read"));
  };
  input.click();
})"""

PLACES = ("both", "generation", "prompt")
UNITS = [
    ("typical: times its typical activation", "typical"),
    ("raw: activations, as the SAE counts them", "raw"),
    ("norm: share of the residual's length", "norm"),
]
START = "The package manager"
FIRST, SECOND = "The package manager installs programs.", "软件包管理器安装程序。"


def make_app(bench: Workbench, layers: Sequence[int], site: str | None = None) -> Any:
    """Gradio's Blocks. `layers` are chosen at first; feature pages are served at `site`."""
    gr = require("gradio", "app")
    row, does = bench.group, Actions(bench, site)
    forms = list(FORMS) if bench.has_chat else list(FORMS)[:1]
    with gr.Blocks(title=f"qwen-scope-lens: {row.short}", analytics_enabled=False) as app:
        reading, edits, scores = gr.State(None), gr.State([]), gr.State({})
        gr.Markdown(f"### {row.short}: {row.d_sae:,} features per layer, {row.k} active per token")
        with gr.Row():
            with gr.Column(scale=3, min_width=420), gr.Tabs():
                with gr.Tab("Read"):
                    text = gr.Textbox(
                        f"{FIRST} {SECOND}", label="Text", lines=3, elem_id="read-text"
                    )
                    with gr.Row():
                        where_read, top_read = _extent(gr, row.layers, layers)
                    go_read = gr.Button("Read", variant="primary", elem_id="read-go")
                    tokens = gr.HighlightedText(
                        label="Tokens, coloured by the chosen feature; click one for its features",
                        combine_adjacent=False,
                        show_legend=False,
                        elem_id="read-tokens",
                    )
                    fires = _table(gr, ("feature", "activation", "label"), "read-table")
                with gr.Tab("Compare"):
                    with gr.Row():
                        text_a = gr.Textbox(FIRST, label="Text A", lines=4, elem_id="compare-a")
                        text_b = gr.Textbox(SECOND, label="Text B", lines=4, elem_id="compare-b")
                    with gr.Row():
                        where_compare, top_compare = _extent(gr, row.layers, layers)
                    left_out = gr.CheckboxGroup(
                        list(LEFT_OUT), value=[LEFT_OUT[0]], label="Leave out"
                    )
                    go_compare = gr.Button("Compare", variant="primary", elem_id="compare-go")
                    columns = ("feature", "|rate A - rate B|", "rate A", "rate B", "mean", "label")
                    differs = _table(gr, columns, "compare-table")
                with gr.Tab("Steer"):
                    with gr.Row():
                        names = [one.name for one in OPERATIONS]
                        op = gr.Dropdown(names, value="add", label="Operation", elem_id="op")
                        unit = gr.Dropdown(UNITS, value="typical", label="Unit", elem_id="unit")
                        where = gr.Dropdown(
                            list(PLACES),
                            value="both",
                            label="Where: or pos=3-8, class=han, first, ...",
                            allow_custom_value=True,
                        )
                    with gr.Row():
                        kind = gr.Radio(
                            [*PRESETS["typical"], CUSTOM], value="Medium", label="Strength", scale=3
                        )
                        strength = gr.Number(1.0, label="Exactly", elem_id="strength")
                    with gr.Row():
                        add = gr.Button("Add edit", size="sm", elem_id="add-edit")
                        remove = gr.Button("Remove the last", size="sm")
                        clear = gr.Button("Clear", size="sm", elem_id="clear")
                        save = gr.Button("Save plan", size="sm", interactive=False, elem_id="save")
                        load = gr.Button("Load plan", size="sm", elem_id="load")
                    plan_text, given = gr.Textbox(visible=False), gr.Textbox(visible=False)
                    refused = gr.HTML(elem_id="plan-refused")
                    plan_columns = ("feature", "operation", "strength", "unit", "where")
                    plan_table = _table(gr, plan_columns, "plan-table")
                    prompt = gr.Textbox(
                        "The package manager", label="Prompt", lines=2, elem_id="prompt"
                    )
                    with gr.Row():
                        form = gr.Radio(forms, value=forms[0], label="Prompt as")
                        new_tokens = gr.Slider(
                            20, 300, 100, step=1, label="New tokens", elem_id="new-tokens"
                        )
                        heat = gr.Slider(0, 1.5, 0, step=0.05, label="Temperature (0: greedy)")
                        seed = gr.Number(0, label="Seed", precision=0, min_width=80)
                    with gr.Row():
                        go_steer = gr.Button("Generate", variant="primary", elem_id="steer-go")
                        stop = gr.Button("Stop", variant="stop", elem_id="steer-stop")
                    status = gr.Markdown(elem_id="status")
                    with gr.Row():
                        plain = gr.Textbox(label="Unsteered", lines=7, elem_id="plain")
                        steered = gr.Textbox(label="Steered", lines=7, elem_id="steered")
                    report = gr.Textbox(label="What the plan did", elem_id="report")
                    with gr.Row():
                        next_plain = _table(gr, ("next, unsteered", "probability"), "next-plain")
                        next_steered = _table(gr, ("next, steered", "probability"), "next-steered")
            with gr.Column(scale=1, min_width=280):
                chosen = gr.Textbox(
                    label="Chosen feature",
                    value=str(bench.ref(layers[-1], 0)),
                    info="its address; a click on a table's line chooses that feature",
                    elem_id="chosen",
                )
                about = gr.HTML(elem_id="about")

        # Only runs of the model queue. What answers at once does not: of two events on the queue's
        # one stream, the answer to the second is lost when the first one's end closes the stream.
        go_read.click(does.read, [text, where_read, top_read], [reading, tokens, fires])
        texts = [text_a, text_b, where_compare, top_compare, left_out]
        go_compare.click(does.compare, texts, [differs, scores])
        results = [status, plain, steered, report, next_plain, next_steered]
        go_steer.click(does.steer, [prompt, form, edits, new_tokens, heat, seed], results)

        at_once = {"queue": False}
        tokens.select(does.on_token, [reading, top_read], fires, **at_once)
        for table in (fires, differs, plan_table):
            table.select(does.picked, None, chosen, **at_once)
        app.load(does.about, chosen, about, **at_once)
        chosen.change(does.about, chosen, about, **at_once)
        chosen.change(does.coloured, [reading, chosen], tokens, **at_once)
        changes = [kind.change, unit.change, chosen.change, scores.change]
        gr.on(changes, does.preset, [kind, unit, chosen, scores], strength, **at_once)
        strength.input(lambda: CUSTOM, None, kind, **at_once)
        changed = [edits, plan_table, plan_text, save, refused]
        add.click(does.add, [edits, chosen, op, strength, unit, where], changed, **at_once)
        remove.click(does.remove, edits, changed, **at_once)
        clear.click(does.clear, edits, changed, **at_once)
        # The browser reads and writes the files: the server never has one.
        save.click(None, plan_text, None, js=SAVE)
        load.click(None, None, given, js=LOAD).then(does.load, [edits, given], changed, **at_once)
        stop.click(does.stop, None, None, **at_once)
        app.unload(does.stop)
    return app


def _extent(gr: Any, known: Sequence[int], layers: Sequence[int]) -> tuple[Any, Any]:
    """Which layers, and how many features of each."""
    value = [str(layer) for layer in layers]
    names = [str(layer) for layer in known]
    return (
        gr.Dropdown(names, value=value, multiselect=True, label="Layers"),
        gr.Slider(1, 20, 5, step=1, label="Features a layer"),
    )


def _table(gr: Any, columns: Sequence[str], name: str) -> Any:
    return gr.Dataframe(
        headers=list(columns),
        column_count=len(columns),
        datatype="str",
        type="array",
        interactive=False,
        wrap=True,
        max_height=360,
        show_label=False,
        elem_id=name,
    )
