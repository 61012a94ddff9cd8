"""What the package `kernels` and uploads of kernels ask of the Hub, on top of the stand-in for models."""

import hashlib
import json
import shutil
from pathlib import Path

from stand_in import COMMIT, handler


def commit_of(branch: str) -> str:
    return COMMIT if branch == "main" else hashlib.sha1(branch.encode()).hexdigest()


def kernel_handler(repositories: dict[str, Path], root: Path):
    """Kernel repositories lie in `root/kernels/<name>/<branch>`."""

    class Handler(handler(repositories, root)):
        def do_POST(self):
            parts = self.path.partition("?")[0].strip("/").split("/")
            if parts == ["api", "repos", "create"]:
                asked = json.loads(self.body())
                assert asked["type"] == "kernel", asked
                name = f"{asked.get('organization') or 'me'}/{asked['name']}"
                (root / "kernels" / name / "main").mkdir(parents=True, exist_ok=True)
                return self.say({"url": f"http://{self.headers['Host']}/kernels/{name}", "name": name, "id": name})
            if parts[:2] == ["api", "kernels"] and parts[4] == "branch":
                self.body()
                repository = root / "kernels" / "/".join(parts[2:4])
                if (repository / parts[5]).exists():
                    return self.send(409, b"", {}, 0)
                shutil.copytree(repository / "main", repository / parts[5])
                return self.say({})
            if parts[:2] == ["api", "kernels"] and parts[4] == "commit":
                return self.commit("/".join(parts[2:4]), self.folder(parts[2:4], parts[5]))
            if parts[:2] == ["api", "kernels"]:
                repositories["/".join(parts[2:4])] = self.folder(parts[2:4], parts[5])
            return super().do_POST()

        def commit(self, name, folder):
            for line in map(json.loads, self.body().splitlines()):
                if line["key"] == "deletedFile":
                    (folder / line["value"]["path"]).unlink()
                elif line["key"] == "file":
                    self.store(folder, line["value"])
            url = f"http://{self.headers['Host']}/kernels/{name}/commit/{commit_of(folder.name)}"
            return self.say({"commitUrl": url, "commitOid": commit_of(folder.name)})

        def folder(self, name, revision):
            branches = (root / "kernels" / "/".join(name)).iterdir()
            return next(folder for folder in branches if revision in (folder.name, commit_of(folder.name)))

        def answer(self, has_body):
            parts = self.path.partition("?")[0].strip("/").split("/")
            if parts[0] == "kernels":
                folder = self.folder(parts[1:3], parts[4])
                return self.send_file(folder / "/".join(parts[5:]), has_body, commit_of(folder.name))
            if parts[:2] != ["api", "kernels"]:
                return super().answer(has_body)
            name, (what, *rest) = "/".join(parts[2:4]), parts[4:] or ["revision", "main"]
            if what == "refs":
                branches = sorted(path.name for path in (root / "kernels" / name).iterdir())
                refs = [{"name": b, "ref": f"refs/heads/{b}", "targetCommit": commit_of(b)} for b in branches]
                return self.say({"branches": refs, "tags": [], "converts": []})
            folder = self.folder(parts[2:4], rest[0])
            paths = sorted((folder / "/".join(rest[1:])).rglob("*"))
            if what == "tree":
                return self.say([entry(path, folder) for path in paths])
            siblings = [{"rfilename": str(path.relative_to(folder))} for path in paths if path.is_file()]
            return self.say({"id": name, "sha": commit_of(folder.name), "siblings": siblings, "private": False})

    return Handler


def entry(path: Path, folder: Path) -> dict:
    common = {"path": path.relative_to(folder).as_posix(), "oid": COMMIT}
    if path.is_dir():
        return common | {"type": "directory", "size": 0}
    return common | {"type": "file", "size": path.stat().st_size}
