//! A whole layer with attention, routed experts and the loss, composed from the backend's operations as in the model,
//! against candle's autograd in f64 on the same values.
//!
//! This uses only candle operations that keep the autograd graph: candle's fused softmax, norm and rope cut it
//! silently.

use crate::values::{Rng, assert_close};
use candle_core::{D, DType, Device, Result, Tensor, Var};
use moewarden::backend::cpu::{Cpu, Weight};
use moewarden::backend::{Backend, ExpertGrad, Heads, HostTensor, Packing, Rope};

const T: usize = 7;
const DIM: usize = 4;
const HEADS: usize = 4;
const KEY_HEADS: usize = 2;
const WIDTH: usize = HEADS * DIM;
const KEY_WIDTH: usize = KEY_HEADS * DIM;
const F: usize = 5;
const E: usize = 4;
const K: usize = 2;
const V: usize = 11;
const EPS: f32 = 1e-5;

/// f32 values with a row-major shape, for the backend and for candle.
struct Param {
    shape: Vec<usize>,
    values: Vec<f32>,
}

impl Param {
    fn new(rng: &mut Rng, shape: &[usize], scale: f32) -> Self {
        Self { shape: shape.to_vec(), values: rng.values(shape.iter().product(), scale) }
    }

    fn weight(&self, cpu: &Cpu) -> Weight {
        cpu.weight(HostTensor::from_f32(self.shape.clone(), &self.values))
    }

    fn var(&self) -> Result<Var> {
        Var::from_tensor(&Tensor::from_slice(&self.values, &self.shape[..], &Device::Cpu)?.to_dtype(DType::F64)?)
    }
}

fn rms_norm(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    let rms = (x.sqr()?.mean_keepdim(D::Minus1)? + f64::from(EPS))?.sqrt()?;
    x.broadcast_div(&rms)?.broadcast_mul(w)
}

fn softmax(x: &Tensor) -> Result<Tensor> {
    let e = x.broadcast_sub(&x.max_keepdim(D::Minus1)?.detach())?.exp()?;
    e.broadcast_div(&e.sum_keepdim(D::Minus1)?)
}

/// `[T, heads·dim]` → `[HEADS, T, dim]`, each head repeated for the query heads that share it.
fn heads(x: &Tensor, heads: usize) -> Result<Tensor> {
    let x = x.reshape((T, heads, DIM))?.transpose(0, 1)?;
    let repeat = HEADS / heads;
    x.unsqueeze(1)?.broadcast_as((heads, repeat, T, DIM))?.reshape((HEADS, T, DIM))
}

#[test]
fn a_layer_agrees_with_autograd() -> Result<()> {
    let mut rng = Rng::new(21);
    let mut param = |shape: &[usize], scale: f32| Param::new(&mut rng, shape, scale);
    let x = param(&[T, WIDTH], 1.0);
    let (norm1, norm2) = (param(&[WIDTH], 1.0), param(&[WIDTH], 1.0));
    let (q, k, v) = (param(&[WIDTH, WIDTH], 0.5), param(&[KEY_WIDTH, WIDTH], 0.5), param(&[KEY_WIDTH, WIDTH], 0.5));
    let (o, router, head) = (param(&[WIDTH, WIDTH], 0.5), param(&[E, WIDTH], 0.5), param(&[V, WIDTH], 0.5));
    let gate: Vec<Param> = (0..E).map(|_| param(&[F, WIDTH], 0.5)).collect();
    let up: Vec<Param> = (0..E).map(|_| param(&[F, WIDTH], 0.5)).collect();
    let down: Vec<Param> = (0..E).map(|_| param(&[WIDTH, F], 0.5)).collect();
    let targets: Vec<u32> = (0..T as u32).map(|t| t * 5 % V as u32).collect();

    // The backend, composed as in a model.
    let cpu = Cpu::new(2);
    let tx = cpu.upload(T, WIDTH, &x.values);
    let [wn1, wn2, wq, wk, wv, wo, wr, wh] = [&norm1, &norm2, &q, &k, &v, &o, &router, &head].map(|p| p.weight(&cpu));
    let (wg, wu, wd): (Vec<_>, Vec<_>, Vec<_>) = (
        gate.iter().map(|p| p.weight(&cpu)).collect(),
        up.iter().map(|p| p.weight(&cpu)).collect(),
        down.iter().map(|p| p.weight(&cpu)).collect(),
    );
    let stacks: Vec<Vec<&Weight>> = wg.iter().zip(&wu).map(|(g, u)| vec![g, u]).collect();
    let downs: Vec<Vec<&Weight>> = wd.iter().map(|w| vec![w]).collect();
    let seqs = cpu.sequences(&Packing::of_lengths([T]), &Rope { inv_freq: vec![], scale: 1.0 });
    let geometry = Heads { queries: HEADS, keys: KEY_HEADS, dim: DIM, window: None };

    let h1 = cpu.rms_norm(&tx, &wn1, EPS);
    let [tq, tk, tv] = [&wq, &wk, &wv].map(|w| cpu.linear(&h1, w, None));
    let (a, ()) = cpu.attention(&tq, &tk, &tv, &seqs, &geometry);
    let mut mid = cpu.linear(&a, &wo, None);
    cpu.add_assign(&mut mid, &tx);
    let h2 = cpu.rms_norm(&mid, &wn2, EPS);
    let logits = cpu.linear(&h2, &wr, None);
    let routing = cpu.route(&logits, K, true);
    let dispatch = cpu.dispatch(&routing, E);
    let rows = cpu.dispatch_rows(&h2, &dispatch);
    let gate_up = cpu.grouped_linear(&rows, &stacks, &dispatch);
    let weighted = cpu.weighted_swiglu(&gate_up, &routing, &dispatch);
    let mut top = cpu.combine_rows(&cpu.grouped_linear(&weighted, &downs, &dispatch), &dispatch);
    cpu.add_assign(&mut top, &mid);
    let mut dhead = cpu.buffer(V * WIDTH);
    let sink = Some((&mut dhead, 0));
    let (loss, mut dtop) = cpu.linear_cross_entropy_backward(&top, &wh, &cpu.indices(&targets), 1.0, sink);

    let (mut dexperts, mut scores) = (cpu.buffer(3 * E * F * WIDTH), cpu.scores(0));
    let (block, size) = (3 * F * WIDTH, F * WIDTH);
    let dout = cpu.dispatch_rows(&dtop, &dispatch);
    let plan: Vec<_> = (0..E).map(|e| ExpertGrad::Accumulate(vec![e * block + 2 * size])).collect();
    cpu.grouped_linear_backward_weight(&dout, &weighted, &downs, &dispatch, &plan, &mut dexperts, &mut scores);
    let dweighted = cpu.grouped_linear_backward_input(&dout, &downs, &dispatch);
    let (dgate_up, dweights) = cpu.weighted_swiglu_backward(dweighted, &gate_up, &routing, &dispatch);
    let plan: Vec<_> = (0..E).map(|e| ExpertGrad::Accumulate(vec![e * block, e * block + size])).collect();
    cpu.grouped_linear_backward_weight(&dgate_up, &rows, &stacks, &dispatch, &plan, &mut dexperts, &mut scores);
    let drows = cpu.grouped_linear_backward_input(&dgate_up, &stacks, &dispatch);
    let mut dh2 = cpu.combine_rows(&drows, &dispatch);
    let dlogits = cpu.route_backward(&dweights, &routing);
    let mut drouter = cpu.buffer(E * WIDTH);
    cpu.linear_backward_weight(&dlogits, &h2, &mut drouter, 0);
    cpu.add_assign(&mut dh2, &cpu.linear_backward_input(&dlogits, &wr));
    let mut dnorms = cpu.buffer(2 * WIDTH);
    let sink = Some((&mut dnorms, WIDTH));
    cpu.add_assign(&mut dtop, &cpu.rms_norm_backward(&dh2, &mid, &wn2, EPS, sink));
    let da = cpu.linear_backward_input(&dtop, &wo);
    let mut dattention = cpu.buffer(2 * (WIDTH + KEY_WIDTH) * WIDTH);
    let (dq, dk, dv) = cpu.attention_backward(&da, &tq, &tk, &tv, (&a, &()), &seqs, &geometry);
    let mut at = 0;
    let mut dh1 = cpu.zeros(T, WIDTH);
    for (dy, w, n) in [(&dq, &wq, WIDTH), (&dk, &wk, KEY_WIDTH), (&dv, &wv, KEY_WIDTH)] {
        cpu.linear_backward_weight(dy, &h1, &mut dattention, at);
        cpu.add_assign(&mut dh1, &cpu.linear_backward_input(dy, w));
        at += n * WIDTH;
    }
    cpu.linear_backward_weight(&dtop, &a, &mut dattention, at);
    let sink = Some((&mut dnorms, 0));
    cpu.add_assign(&mut dtop, &cpu.rms_norm_backward(&dh1, &tx, &wn1, EPS, sink));

    // candle.
    let [vx, vn1, vn2] = [x.var()?, norm1.var()?, norm2.var()?];
    let [vq, vk, vv, vo] = [q.var()?, k.var()?, v.var()?, o.var()?];
    let (vr, vh) = (router.var()?, head.var()?);
    let experts: Vec<[Var; 3]> =
        (0..E).map(|e| Ok([gate[e].var()?, up[e].var()?, down[e].var()?])).collect::<Result<_>>()?;
    let h1 = rms_norm(&vx, &vn1)?;
    let project = |w: &Var, n: usize| heads(&h1.matmul(&w.t()?)?, n);
    let (cq, ck, cv) = (project(&vq, HEADS)?, project(&vk, KEY_HEADS)?, project(&vv, KEY_HEADS)?);
    let future: Vec<f64> = (0..T * T).map(|i| if i % T > i / T { -1e30 } else { 0.0 }).collect();
    let mask = Tensor::from_vec(future, (T, T), &Device::Cpu)?;
    let scores = (cq.matmul(&ck.t()?.contiguous()?)? / (DIM as f64).sqrt())?.broadcast_add(&mask)?;
    let a = softmax(&scores)?.matmul(&cv)?.transpose(0, 1)?.contiguous()?.reshape((T, WIDTH))?;
    let mid = (a.matmul(&vo.t()?)? + vx.as_tensor())?;
    let h2 = rms_norm(&mid, &vn2)?;
    let p = softmax(&h2.matmul(&vr.t()?)?)?;
    let ids = cpu.expert_ids(&routing);
    let mut chosen = vec![0.0; T * E];
    ids.iter().enumerate().for_each(|(slot, &e)| chosen[slot / K * E + e as usize] = 1.0);
    let p = (p * Tensor::from_vec(chosen, (T, E), &Device::Cpu)?)?;
    let p = p.broadcast_div(&p.sum_keepdim(D::Minus1)?)?;
    let mut top = mid.clone();
    for (e, [g, u, d]) in experts.iter().enumerate() {
        let g = h2.matmul(&g.t()?)?;
        let silu = (&g / (g.neg()?.exp()? + 1.0)?)?;
        let y = (silu * h2.matmul(&u.t()?)?)?.matmul(&d.t()?)?;
        top = (top + y.broadcast_mul(&p.narrow(1, e, 1)?)?)?;
    }
    let probabilities = softmax(&top.matmul(&vh.t()?)?)?;
    let ids = Tensor::from_slice(&targets, (T, 1), &Device::Cpu)?;
    let value = probabilities.gather(&ids, 1)?.log()?.sum_all()?.neg()?;
    let grads = value.backward()?;
    let grad = |v: &Var| -> Result<Vec<f64>> {
        let missing = || candle_core::Error::Msg("candle's graph was cut".into());
        grads.get(v).ok_or_else(missing)?.flatten_all()?.to_vec1()
    };

    let close = |actual: &[f32], expected: &[f64]| {
        assert_close(actual, expected, 2e-5, 2e-5, "a dozen f32 operations of depth up to 16, gradients of size 1");
    };
    close(&[loss as f32], &[value.to_scalar()?]);
    close(&cpu.download(&dtop), &grad(&vx)?);
    close(&cpu.buffer_read(&dhead, 0..V * WIDTH), &grad(&vh)?);
    close(&cpu.buffer_read(&drouter, 0..E * WIDTH), &grad(&vr)?);
    close(&cpu.buffer_read(&dnorms, 0..2 * WIDTH), &[grad(&vn1)?, grad(&vn2)?].concat());
    close(
        &cpu.buffer_read(&dattention, 0..at + WIDTH * WIDTH),
        &[grad(&vq)?, grad(&vk)?, grad(&vv)?, grad(&vo)?].concat(),
    );
    let want = experts.iter().flatten().map(grad).collect::<Result<Vec<_>>>()?.concat();
    close(&cpu.buffer_read(&dexperts, 0..3 * E * F * WIDTH), &want);
    Ok(())
}
