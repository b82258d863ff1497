"""Writes grafana_schema.json: Grafana's own types of a dashboard, as one JSON schema.

    .venv/bin/python -m tests.deploy.grafana_schema     # needs npm and its registry

The types are those of the npm package @grafana/schema (Apache-2.0), without their descriptions.
`#/definitions/dashboard` is a whole dashboard. `#/definitions/KIND.options` and `KIND.custom` are
the options and the field settings of a panel; a dashboard's own type leaves them open. One type
is opened here: that of an annotation's query. It closes out every data source's own query, and
says itself that this is to be mended.

Not covered: whether the committed file is the newest; queries, whose type is not in the package.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

VERSION = "11.6.0"
"""Of Grafana, as in deploy/compose.yaml."""
SCHEMA = Path(__file__).with_suffix(".json")
PACKAGES = (f"@grafana/schema@{VERSION}", "ts-json-schema-generator@2.4.0", "typescript@5.8.3")
RAW = "node_modules/@grafana/schema/dist/esm/raw"
KINDS = {
    "stat": "StatPanelCfg",
    "state-timeline": "StateTimelinePanelCfg",
    "table": "TablePanelCfg",
    "timeseries": "TimeSeriesPanelCfg",
}


def generate(folder: Path, file: str, name: str) -> dict[str, Any]:
    """Return the JSON schema of the type `name` in a file of the package."""
    command = ["npx", "ts-json-schema-generator", "--no-type-check", "--tsconfig", "tsconfig.json"]
    command += ["--path", f"{RAW}/{file}_types.gen.d.ts", "--type", name]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    generated: dict[str, Any] = json.loads(done.stdout)
    return generated


def compact(part: Any, prefix: str) -> Any:
    """Return a part of a schema without descriptions, with `prefix` before names of definitions."""
    if isinstance(part, list):
        return [compact(item, prefix) for item in part]
    if not isinstance(part, dict):
        return part
    kept = {k: v for k, v in part.items() if k != "description" or not isinstance(v, str)}
    if isinstance(kept.get("$ref"), str):
        kept["$ref"] = kept["$ref"].replace("#/definitions/", f"#/definitions/{prefix}")
    return {key: compact(value, prefix) for key, value in kept.items()}


def schema() -> dict[str, Any]:
    """Return the schema of all parts; CalledProcessError if npm fails."""
    parts = [("dashboard", "dashboard/x/dashboard", "Dashboard")]
    for kind, file in KINDS.items():
        path = f"composable/{kind.replace('-', '')}/panelcfg/x/{file}"
        parts.append((f"{kind}.options", path, "Options"))
        if kind != "stat":
            parts.append((f"{kind}.custom", path, "FieldConfig"))
    definitions: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tsconfig.json").write_text('{"compilerOptions": {"moduleResolution": "node"}}')
        subprocess.run(["npm", "install", "--silent", *PACKAGES], cwd=folder, check=True)
        for part, file, type_name in parts:
            generated = generate(folder, file, type_name)
            definitions[part] = {"$ref": f"#/definitions/{part}.{type_name}"}
            for definition, content in generated["definitions"].items():
                definitions[f"{part}.{definition}"] = compact(content, f"{part}.")
    for name in ("AnnotationQuery", "AnnotationTarget"):
        definitions[f"dashboard.{name}"]["additionalProperties"] = True
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "$comment": f"From the npm package @grafana/schema {VERSION}, Apache-2.0, Grafana Labs",
        "definitions": definitions,
    }


if __name__ == "__main__":
    SCHEMA.write_text(json.dumps(schema(), separators=(",", ":"), sort_keys=True) + "\n")
