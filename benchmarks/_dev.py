import sys, time, weakref, torch, json, collections, gc, logging, itertools, os
sys.path.insert(0, ".")
from benchmarks.gpu_verify import random_model, LLAMA_8B, random_requests
from benchmarks.measure import copy_bandwidth
from hf_async_batching import BatchingConfig
from hf_async_batching.assembly import assemble, compile_for
from hf_async_batching.timeline import Timeline
logging.basicConfig(level=logging.INFO)
logging.getLogger("hf_async_batching").setLevel(logging.INFO)
dev = torch.device("cuda")
OUT = os.environ.get("OUT", "/tmp")

def drive(a, reqs, n=None):
    e = a.engine
    for r in reqs: e.add(r)
    e.records.clear()
    toks = collections.defaultdict(list)
    t = time.perf_counter(); k = 0
    with torch.inference_mode():
        while e.has_work:
            for em in e.step():
                if em.token is not None: toks[em.request_id].append(em.token)
            k += 1
    return time.perf_counter() - t, toks

def figures(a, bw, what):
    tl = Timeline(tuple(a.engine.records))
    dec = [r for r in tl.steps if not r.prompt_tokens]
    gaps = sorted(b.compute[1] - x.compute[1] for x, b in itertools.pairwise(dec) if b.step == x.step + 1)
    med = gaps[len(gaps) // 2]
    host = sorted((r.plan[1]-r.plan[0]) + (r.settle[1]-r.settle[0]) for r in dec)[len(dec)//2]
    print(f"{what}: decode median {1e3*med:.3f} ms, busy {100*tl.busy_fraction:.1f}, host median {1e3*host:.3f} ms, steps {len(tl.steps)}", flush=True)
    return med

def profile(a, reqs, name, mixed=False):
    e = a.engine
    for r in reqs: e.add(r)
    with torch.inference_mode():
        while not mixed and (e.scheduler._waiting or any(s.state.value == "prefilling" for s in e.scheduler._running)): e.step()
        for _ in range(5): e.step()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
            for _ in range(5): e.step()
            torch.cuda.synchronize()
        while e.has_work: e.step()
    tot = collections.Counter(); cnt = collections.Counter()
    for ev in p.events():
        if ev.device_type == torch.autograd.DeviceType.CUDA:
            tot[ev.name] += ev.time_range.end - ev.time_range.start; cnt[ev.name] += 1
    print(f"-- {name}: per step: total {sum(tot.values())/5:.0f} us in {sum(cnt.values())/5:.0f} kernels")
    for k, v in tot.most_common(22): print(f"   {v/5:8.1f} us {cnt[k]/5:6.1f} x {v/cnt[k]:7.2f}  {k[:110]}")
    spans = sorted((ev.time_range.start, ev.time_range.end, ev.name) for ev in p.events() if ev.device_type == torch.autograd.DeviceType.CUDA)
    with open(f"{OUT}/{name}.txt", "w") as f:
        for s, t, n in spans[: 1200]: f.write(f"{s-spans[0][0]:.2f} {t-s:.2f} {n[:100]}\n")

def acc(model, a, rr):
    from benchmarks.measure import teacher_forced
    _, toks = drive(a, rr); print("  accuracy", teacher_forced(model, rr, toks))

what = sys.argv[1]
bw = copy_bandwidth(dev); print("bw", bw/1e12)
if what == "8b":
    t = time.perf_counter(); model = random_model(LLAMA_8B, dev, torch.bfloat16); torch.cuda.synchronize(); print("model", time.perf_counter()-t)
    rows, prompt, new = 32, 3900, 200
else:
    from transformers import Qwen3Config, AutoModelForCausalLM
    torch.manual_seed(0)
    with dev: model = AutoModelForCausalLM.from_config(Qwen3Config(vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128, max_position_embeddings=40960, tie_word_embeddings=True), dtype=torch.bfloat16).eval()
    rows, prompt, new = 256, 64, 512
reqs = lambda n=rows, p=prompt, k=new: random_requests(n, p, k, 100000)
mem0 = torch.cuda.memory_allocated(); print("weights GiB", mem0/2**30)
for fuse, comp in ((True, True), (True, False), (False, False))[: int(sys.argv[2])]:
    torch.cuda.reset_peak_memory_stats()
    t = time.perf_counter()
    import cProfile, pstats
    pr = cProfile.Profile(); pr.enable()
    a = assemble(model, BatchingConfig(depth=2, max_sequence_length=prompt+new+16, fuse_weights=fuse, timeline_steps=20000))
    pr.disable(); pstats.Stats(pr, stream=open(f"{OUT}/{what}{fuse}{comp}.prof", "w")).sort_stats("cumulative").print_stats(60)
    print("assemble", time.perf_counter()-t, "packed", a.forward.packed_groups, "alloc", torch.cuda.memory_allocated()/2**30, "cache", a.cache.num_bytes/2**30, "peak", torch.cuda.max_memory_allocated()/2**30, flush=True)
    t = time.perf_counter(); drive(a, reqs(1, 32, 2)); print("first request", time.perf_counter()-t, flush=True)
    if comp:
        from torch._dynamo.utils import counters
        t = time.perf_counter()
        with torch.inference_mode(): ok = compile_for(model, weakref.ref(a))
        print("compile", ok, time.perf_counter()-t, dict(counters["stats"]), flush=True)
    drive(a, reqs(rows, 16, 6)); drive(a, reqs(4, 2048, 2))
    tl = Timeline(tuple(a.engine.records)); print("  mixed steps ms", [(r.prompt_tokens, round(1e3*(r.compute[1]-r.compute[0]),2), round(1e3*(r.plan[1]-r.plan[0]),2)) for r in tl.steps])
    drive(a, reqs(rows, 64, 8)); drive(a, reqs(rows, prompt, 4)); t, toks = drive(a, reqs())
    med = figures(a, bw, f"fuse {fuse} compile {comp}: {t:.2f} s {rows*new/t:.0f} tok/s")
    wb = a.forward.weight_bytes; kv = sum(l.bytes_per_token for l in a.forward.layers) * rows * (prompt + new/2)
    print("  MBU %.1f" % (100*(wb+kv)/med/bw), "peak GiB", torch.cuda.max_memory_reserved()/2**30, "graphs MiB", a.engine.device.graph_bytes()/2**20)
    print("  unique graphs", dict(counters["stats"]) if comp else "")
    profile(a, reqs(rows, prompt, 200), f"{what}_{fuse}_{comp}")
    profile(a, reqs(rows, 1000, 40), f"{what}_{fuse}_{comp}_mixed", True)
    if comp: first = toks; acc(model, a, reqs(2, 200, 100))
    else: print("  tokens equal fraction", sum(x == y for i in toks for x, y in zip(toks[i], first[i])) / (rows*new))
    a.engine.close(); del a; gc.collect(); torch.cuda.empty_cache()
