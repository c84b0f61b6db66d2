"""A page that runs a model in a browser. page/: what is served; kernels/: AssemblyScript that scripts/web/build.py makes kernels.wasm of."""
