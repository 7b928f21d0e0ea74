//! Training with several ranks on the GPU backend with emulated kernels: exchanging gradients and weights between GPUs
//! and through the host gives the same result.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use crate::case::{Case, CaseRun, Tolerance, assert_near, fixture_name};
use crate::emulator::device;
use moewarden::backend::Dtype;
use moewarden::backend::cuda::gpu::{Address, Gpu};
use moewarden::backend::cuda::pool::Reuse;
use moewarden::backend::cuda::{Cuda, Peers};
use moewarden::collective::conformance::on_threads;
use moewarden::collective::nccl::DeviceCollective;
use moewarden::collective::{Collective, Error, Result};
use moewarden::launch::Rank;
use moewarden::model::{LossGrads, OffloadedBelow, ParamId, ParamKind, PassEnd};
use moewarden::optim::LearningRates;
use moewarden::train::{DeviceTransport, GpuTransport, Trainer};
use moewarden::ui::Ui;

type Queued = Box<dyn FnOnce() -> Result<()> + Send>;

/// Runs everything as late as allowed, that is when the host waits, so that premature reads and writes are detected.
struct Late {
    gpu: Arc<dyn Gpu>,
    world: Arc<dyn Collective>,
    queue: Mutex<VecDeque<Queued>>,
    /// Number of queued operations.
    count: Arc<Mutex<usize>>,
}

impl Late {
    fn queue(&self, operation: impl FnOnce() -> Result<()> + Send + 'static) -> Result<()> {
        *self.count.lock().unwrap() += 1;
        self.queue.lock().unwrap().push_back(Box::new(operation));
        Ok(())
    }
}

fn read<T: bytemuck::Pod>(gpu: &dyn Gpu, at: u64, len: usize) -> Vec<T> {
    let mut values = vec![T::zeroed(); len];
    if len > 0 {
        gpu.copy_out(Address(at), bytemuck::cast_slice_mut(&mut values)).unwrap();
    }
    values
}

fn write<T: bytemuck::Pod>(gpu: &dyn Gpu, at: u64, values: &[T]) {
    if !values.is_empty() {
        gpu.copy_in(Address(at), bytemuck::cast_slice(values)).unwrap();
    }
}

impl DeviceCollective for Late {
    fn rank(&self) -> usize {
        self.world.rank()
    }

    fn world_size(&self) -> usize {
        self.world.world_size()
    }

    fn all_reduce_f32(&self, values: u64, len: usize) -> Result<()> {
        let (gpu, world) = (self.gpu.clone(), self.world.clone());
        self.queue(move || {
            let mut sum = read(&*gpu, values, len);
            world.all_reduce_f32(&mut sum)?;
            write(&*gpu, values, &sum);
            Ok(())
        })
    }

    fn reduce_scatter_f32(&self, values: u64, counts: &[usize], part: u64) -> Result<()> {
        let (gpu, world, counts) = (self.gpu.clone(), self.world.clone(), counts.to_vec());
        self.queue(move || {
            let mut own = vec![0.0; counts[world.rank()]];
            world.reduce_scatter_f32(&read(&*gpu, values, counts.iter().sum()), &counts, &mut own)?;
            write(&*gpu, part, &own);
            Ok(())
        })
    }

    fn all_gather_into(&self, part: u64, counts: &[usize], out: u64) -> Result<()> {
        let (gpu, world, counts) = (self.gpu.clone(), self.world.clone(), counts.to_vec());
        self.queue(move || {
            let mut all = vec![0u8; counts.iter().sum()];
            world.all_gather_into(&read(&*gpu, part, counts[world.rank()]), &counts, &mut all)?;
            write(&*gpu, out, &all);
            Ok(())
        })
    }

    fn join(&self) -> Result<()> {
        assert!(self.queue.lock().unwrap().is_empty(), "the host has not waited");
        Ok(())
    }

    fn wait(&self) -> Result<()> {
        std::mem::take(&mut *self.queue.lock().unwrap()).into_iter().try_for_each(|operation| operation())
    }

    fn abort(&self) {}
}

/// All ranks of a world, among which experts are divided.
struct Dividing(Arc<dyn Collective>);

impl Peers for Dividing {
    fn index(&self) -> usize {
        self.0.rank()
    }
    fn count(&self) -> usize {
        self.0.world_size()
    }
    fn in_process(&self) -> bool {
        true
    }
    fn exchange(&self, bytes: &[u8]) -> Vec<Vec<u8>> {
        self.0.all_gather(bytes).unwrap()
    }
}

/// Gradient norms and all weights after two steps that train `chosen`, with one row per rank, and the number of
/// operations between GPUs. A single rank takes the rows of two.
fn train(
    name: &str,
    chosen: fn(ParamKind) -> bool,
    ranks: usize,
    between_gpus: bool,
) -> (Vec<f64>, Vec<Vec<f32>>, usize) {
    train_divided(name, chosen, ranks, between_gpus, false)
}

/// The same with routed experts divided among the ranks, or not.
fn train_divided(
    name: &str,
    chosen: fn(ParamKind) -> bool,
    ranks: usize,
    between_gpus: bool,
    divided: bool,
) -> (Vec<f64>, Vec<Vec<f32>>, usize) {
    const LOSS: LossGrads<'static> = LossGrads { ce_scale: 0.01, routers: &[] };
    let case = Arc::new(Case::open(name));
    let mut all = on_threads(ranks, move |world| {
        let world: Arc<dyn Collective> = Arc::new(world);
        let gpu = device::gpu();
        let cuda = Cuda::new(gpu.clone(), Dtype::F32, Reuse::Segments);
        let cuda = Arc::new(if divided { cuda.with_peers(Arc::new(Dividing(world.clone()))) } else { cuda });
        let count = Arc::new(Mutex::new(0));
        let late = Late { gpu, world: world.clone(), queue: Mutex::default(), count: count.clone() };
        let transport: Arc<dyn DeviceTransport<Cuda>> =
            Arc::new(GpuTransport::new(Box::new(late), world.clone(), cuda.clone()));
        let rank = Rank::new(world, Ui::silent());
        let below = OffloadedBelow(if divided { case.session.model.layers.len() } else { 0 });
        let mut run = CaseRun::offloaded(&case.session, &case.config, cuda, &rank, below);
        run.replica.transport = between_gpus.then_some(transport);
        let ids: Vec<ParamId> =
            run.model().table.iter().filter(|(_, spec)| chosen(spec.kind)).map(|(id, _)| id).collect();
        let mut trainer = Trainer::with_bucket_size(&run.replica, &ids, 3000);
        let mut norms = Vec::new();
        for step in 0..2 {
            let rows = (0..2).filter(|row| row % ranks == run.replica.world.rank());
            let done = trainer.accumulate(&run.replica, |passes| {
                for row in rows {
                    let inputs = run.replica.inputs(&run.sampler().pack_unsafe(&[2 * step + row]));
                    let forward = passes.forward(&inputs, PassEnd::Loss { all_rows: false }, None);
                    passes.backward(&inputs, forward, LOSS, row + ranks >= 2);
                }
            });
            done.unwrap();
            let norm = trainer.norm(&run.replica).unwrap();
            let rates = LearningRates { expert: 1e-3, router: 1e-3, other: 1e-3 };
            let updates = run.recipe.updates.clone();
            trainer.update(&mut run.replica, &rates, norm.value, &updates).unwrap();
            norms.push(norm.value);
        }
        let weights = (0..case.session.table.params.len()).map(|id| run.model().weight_host(id).to_f32()).collect();
        let operations = *count.lock().unwrap();
        (norms, weights, operations)
    });
    let first = all.swap_remove(0);
    assert!(all.iter().all(|other| other.1 == first.1), "{name}: the ranks hold different weights");
    first
}

#[test]
fn ranks_agree_whichever_way_gradients_take() {
    let layer: fn(ParamKind) -> bool = |kind| kind.layer() == Some(1);
    let experts: fn(ParamKind) -> bool = |kind| matches!(kind, ParamKind::Expert(_, expert, _) if expert % 3 == 0);
    for (name, chosen) in [("olmoe", experts), ("qwen2_moe", layer)] {
        let (norms, single, _) = train(name, chosen, 1, true);
        let (over_host, weights_over_host, none) = train(name, chosen, 2, false);
        let (direct, weights, operations) = train(name, chosen, 2, true);
        assert_eq!(none, 0);
        let params = Case::open(name).session.table.params.iter().filter(|spec| chosen(spec.kind)).count();
        assert_eq!(operations, 2 * 2 * params, "{name}: in each step a sum and a gathering of each parameter");
        // A sum over two ranks has only one order.
        assert_eq!(direct, over_host, "{name}: norms");
        assert!(weights == weights_over_host, "{name}: weights");
        let tolerance = Tolerance { relative: 1e-5, absolute: 0.0, why: "f32 sums over ranks in place of passes" };
        assert_near(name, &direct, &norms, tolerance);
        for (id, spec) in Case::open(name).session.table.iter() {
            let wide = |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect::<Vec<_>>();
            let near =
                Tolerance { relative: 0.0, absolute: 2e-5, why: "of steps of 1e-3: AdamW divides by tiny gradients" };
            assert_near(&format!("{name}: {}", fixture_name(spec)), &wide(&weights[id]), &wide(&single[id]), near);
            let source = spec.base.to_f32();
            assert_eq!(weights[id] != source, chosen(spec.kind), "{name}: {} moved", fixture_name(spec));
        }
    }
}

/// Whether each rank holds all experts or a part of them, norms and weights have the same bits: experts are read from other ranks'
/// GPUs, and each rank writes its part of trained ones. The second step reads what the first has written. With three ranks, one has
/// no rows, and takes no part in the passes.
#[test]
fn experts_divided_among_ranks_give_the_same_bits() {
    let experts: fn(ParamKind) -> bool = |kind| matches!(kind, ParamKind::Expert(_, expert, _) if expert % 3 == 0);
    for (ranks, between_gpus) in [(2, true), (3, false)] {
        let whole = train("olmoe", experts, ranks, between_gpus);
        let divided = train_divided("olmoe", experts, ranks, between_gpus, true);
        assert!(divided == whole, "{ranks} ranks");
    }
}

#[test]
fn a_rank_that_fails_frees_those_that_wait_for_its_gpu() {
    let errors = on_threads(2, |world| {
        let world: Arc<dyn Collective> = Arc::new(world);
        let gpu = device::gpu();
        let cuda = Arc::new(Cuda::new(gpu.clone(), Dtype::F32, Reuse::Segments));
        if world.rank() == 1 {
            world.abort(moewarden::exit::IO, "the disk is full");
            return None;
        }
        let late = Late { gpu, world: world.clone(), queue: Mutex::default(), count: Arc::default() };
        GpuTransport::new(Box::new(late), world, cuda).finish().err()
    });
    assert!(matches!(&errors[0], Some(Error::Aborted { rank: 1, .. })), "{errors:?}");
}
