import yaml, time
def test_it(toys, tmp_path, capfd):
    from typer.testing import CliRunner
    from ultrafuser.cli import app
    for bank in ("whole","adapters"):
        (tmp_path/f"{bank}.yaml").write_text(yaml.safe_dump(toys.recipe(bank)))
        t=time.time()
        with capfd.disabled():
            r=CliRunner().invoke(app,["train",str(tmp_path/f"{bank}.yaml"),"-o",str(tmp_path/bank)],catch_exceptions=False)
            print(r.output, r.exit_code, time.time()-t)
            import os; os.system(f"cd {tmp_path}/{bank}; find . -type f; cat metrics.json | head -40")
