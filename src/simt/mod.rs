//! The CUDA kernels on the CPU: the same source files, compiled as C++ and run by a simulator that
//! checks every access and every barrier. For tests on machines without a GPU; slow.

pub mod machine;
mod session;
mod shards;
mod sparse;
mod table;

use std::ffi::c_void;

use machine::Buffer;

use crate::call::{
    RawCall, RawEntropies, RawLabels, RawLogits, RawOutput, RawRows, RawSelection, RawTeacher,
    RawTokens,
};
pub use crate::device::kernel::Kernel;
use crate::device::kernel::{KERNELS, Launch, Shrinks};
use crate::device::stages::{self, Checked};
use crate::device::workspace::{Layout, Memory};
use crate::params::atkd_summary;
use crate::plan::{DeviceProperties, LaunchShape, Plan, Preference};
use crate::unfused::device;
use crate::{
    Batch, Elements, Error, Labels, Logits, LogitsMut, Objective, Output, Result, SelectionRule,
    Teacher,
};
pub use session::Session;

/// The inputs of a call beside the logits, as memory of kernels.
struct Inputs<'a> {
    batch: Batch<'a>,
    offsets: Option<Vec<i64>>,
    upstream: Option<Vec<f32>>,
    tokens: RawTokens,
}

impl<'a> Inputs<'a> {
    fn new(batch: &Batch<'a>, extra: Extra) -> Self {
        let offsets: Option<Vec<i64>> =
            batch.sequences().map(|offsets| offsets.iter().map(|&offset| offset as i64).collect());
        let upstream = extra.upstream.map(|upstream| vec![upstream]);
        let tokens = RawTokens {
            tokens: batch.teacher().tokens(),
            vocab: batch.teacher().vocab(),
            labels: batch.labels().map(raw_labels),
            sequences: offsets.as_ref().map(|offsets| (address(offsets), offsets.len() - 1)),
            margins: batch.margins().map(address),
            hard: batch.hard().map(address),
            token_weights: batch.token_weights().map(address),
            temperatures: batch.temperatures().map(address),
            upstream: upstream.as_ref().map(|upstream| address(upstream)),
        };
        Self { batch: *batch, offsets, upstream, tokens }
    }

    fn buffers(&self) -> impl Iterator<Item = Buffer> {
        let Self { batch, offsets, upstream, .. } = self;
        [
            batch.labels().map(labels),
            offsets.as_ref().map(|offsets| Buffer::input("offsets", offsets)),
            batch.margins().map(|margins| Buffer::input("margins", margins)),
            batch.hard().map(|hard| Buffer::input("hard", hard)),
            batch.token_weights().map(|weights| Buffer::input("token weights", weights)),
            batch.temperatures().map(|own| Buffer::input("temperatures", own)),
            upstream.as_ref().map(|upstream| Buffer::input("upstream", upstream)),
        ]
        .into_iter()
        .flatten()
    }
}

fn labels(labels: Labels) -> Buffer {
    match labels {
        Labels::I64(v) => Buffer::input("labels", v),
        Labels::I32(v) => Buffer::input("labels", v),
    }
}

fn raw_labels(labels: Labels) -> RawLabels {
    match labels {
        Labels::I64(v) => RawLabels::I64(address(v)),
        Labels::I32(v) => RawLabels::I32(address(v)),
    }
}

/// How the kernels are run.
#[derive(Clone, Copy, Debug)]
pub struct Simulation {
    /// The device that is simulated, as far as the plan goes.
    pub device: DeviceProperties,
    /// Threads of a block and blocks of a cluster, at most, whatever the plan says: a block of hundreds of
    /// threads is slow to simulate.
    pub block: u32,
    /// See `block`. Neither holds for rows that are held on chip, where it is the plan's blocks that have
    /// room for a row.
    pub cluster: u32,
    /// The kernel for rows, if it is not to be the plan's choice.
    pub preferred: Option<Preference>,
    /// The key from which tokens are predicted to be hard.
    pub predicted_threshold: u32,
    /// The seed of the order in which blocks and threads take turns: no result may depend on it.
    pub seed: u64,
}

impl Default for Simulation {
    /// An H200, with blocks of two warps and clusters of two blocks.
    fn default() -> Self {
        let device = DeviceProperties::H200;
        Self {
            device,
            block: 64,
            cluster: 2,
            preferred: None,
            // The key of a margin of 0: an uncertainty of a half.
            predicted_threshold: 1 << 31,
            seed: 0,
        }
    }
}

/// Bytes that one kernel read and wrote, by buffer.
pub type Traffic = Vec<(&'static str, Vec<Buffer>)>;

/// The inputs of a call beside the batch and the student's logits.
#[derive(Clone, Copy, Debug, Default)]
pub struct Extra {
    /// The gradient of what comes after.
    pub upstream: Option<f32>,
}

/// Memory of any element type, as a kernel's buffer.
fn input(name: &'static str, elements: Elements) -> Buffer {
    match elements {
        Elements::F32(v) => Buffer::input(name, v),
        Elements::F16(v) => Buffer::input(name, v),
        Elements::Bf16(v) => Buffer::input(name, v),
    }
}

fn raw(logits: Logits) -> RawLogits {
    let address = logits.elements().as_ptr() as u64;
    RawLogits { address, dtype: logits.dtype(), strides: logits.strides() }
}

fn address<T>(slice: &[T]) -> u64 {
    slice.as_ptr() as u64
}

/// Does what [`cpu::forward`](crate::cpu::forward) does, through the CUDA kernels.
///
/// # Errors
/// As [`cpu::forward`](crate::cpu::forward); and if a kernel does what it must not, or the system does not give its
/// threads their stacks.
pub fn forward(objective: &Objective, batch: &Batch, student: Logits) -> Result<Output> {
    batch.valid_labels(objective)?;
    Ok(Simulation::default().run(objective, batch, student, None, Extra::default())?.0)
}

/// Does what [`cpu::forward_backward`](crate::cpu::forward_backward) does, through the CUDA kernels.
///
/// # Errors
/// As [`cpu::forward_backward`](crate::cpu::forward_backward); and as [`forward`].
pub fn forward_backward(
    objective: &Objective,
    batch: &Batch,
    student: Logits,
    mut gradient: LogitsMut,
) -> Result<Output> {
    batch.valid_labels(objective)?;
    let simulation = Simulation::default();
    Ok(simulation.run(objective, batch, student, Some(&mut gradient), Extra::default())?.0)
}

impl Simulation {
    /// Loss, gradient where one is wanted, and what was read and written. Labels are checked by the
    /// kernels alone, as on a GPU.
    ///
    /// # Errors
    /// As [`forward_backward`], or if a kernel met a label that is out of range.
    pub fn run(
        self,
        objective: &Objective,
        batch: &Batch,
        student: Logits,
        gradient: Option<&mut LogitsMut>,
        extra: Extra,
    ) -> Result<(Output, Traffic)> {
        batch.check_shape("the student's logits", [student.tokens(), student.vocab()])?;
        let mut buffers = vec![input("student", student.elements())];
        if let Some(gradient) = &gradient {
            let view = gradient.as_logits();
            batch.check_shape("the gradient", [view.tokens(), view.vocab()])?;
            buffers.push(Buffer { writable: true, ..input("gradient", view.elements()) });
        }
        self.call(
            objective,
            batch,
            raw(student),
            gradient.map(|g| raw(g.as_logits())),
            extra,
            buffers,
        )
    }

    /// Does what [`run`](Self::run) does, with the gradient written over the student's logits.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn run_in_place(
        self,
        objective: &Objective,
        batch: &Batch,
        student: &mut LogitsMut,
        extra: Extra,
    ) -> Result<(Output, Traffic)> {
        let view = student.as_logits();
        batch.check_shape("the student's logits", [view.tokens(), view.vocab()])?;
        let buffers = vec![Buffer { writable: true, ..input("student", view.elements()) }];
        self.call(objective, batch, raw(view), Some(raw(view)), extra, buffers)
    }

    fn call(
        self,
        objective: &Objective,
        batch: &Batch,
        student: RawLogits,
        gradient: Option<RawLogits>,
        extra: Extra,
        mut buffers: Vec<Buffer>,
    ) -> Result<(Output, Traffic)> {
        let teacher = match batch.teacher() {
            Teacher::Dense(logits) => logits,
            Teacher::Sparse(teacher) => {
                let inputs = Inputs::new(batch, extra);
                return self.sparse_call(objective, inputs, &teacher, student, gradient, buffers);
            }
        };
        let inputs = Inputs::new(batch, extra);
        buffers.push(input("teacher", teacher.elements()));
        buffers.extend(inputs.buffers());
        let (tokens, vocab) = (teacher.tokens(), teacher.vocab());
        let rows =
            RawRows { tokens, teacher: raw(teacher), student, gradient, gradient_padding: 0 };
        let call = inputs.tokens.whole_call(&rows);
        let layout = Layout { capacity: tokens };
        let workspace = self.workspace(layout, &mut buffers);
        let checked = Checked::new(objective, &call)?;
        let plan = Plan::new(&self.device, &checked.problem, self.preferred);
        let mut traffic = Vec::new();
        let memory = Memory::new(layout, address(&workspace));
        for launch in stages::launches(&checked, &RawOutput::default(), &plan, memory)? {
            let mut buffers = buffers.clone();
            self.launch(&launch, &mut buffers)?;
            traffic.push((launch.kernel, buffers));
        }
        // SAFETY: so many bytes are there, all of them written.
        let bytes =
            unsafe { std::slice::from_raw_parts(workspace.as_ptr().cast::<u8>(), layout.bytes()) };
        Ok((layout.read(bytes, tokens, vocab, objective)?, traffic))
    }

    /// The memory that kernels work in, and its columns as buffers.
    fn workspace(self, layout: Layout, buffers: &mut Vec<Buffer>) -> Vec<u128> {
        // 16 bytes a piece, for the alignment of a device's memory; poisoned but for the summary.
        let mut workspace =
            vec![0xdead_beef_dead_beef_dead_beef_dead_beef_u128; layout.bytes() / 16];
        // SAFETY: the workspace starts with room for a summary, of plain numbers, which any alignment of 8 suits.
        unsafe {
            let summary = workspace.as_mut_ptr().cast::<atkd_summary>();
            summary.write_bytes(0, 1);
            (*summary).predicted_threshold = self.predicted_threshold;
        }
        buffers.extend(
            layout
                .columns(address(&workspace) as usize)
                .map(|(name, addresses)| Buffer::at(name, addresses)),
        );
        workspace
    }

    /// The margins of [`cpu::teacher_margins`](crate::cpu::teacher_margins), and what was read and written. The margin
    /// of a label out of range is NaN.
    ///
    /// # Errors
    /// If labels are needed and missing, or the kernel does what it must not.
    pub fn teacher_margins(
        self,
        objective: &Objective,
        batch: &Batch,
    ) -> Result<(Vec<f32>, Traffic)> {
        let teacher = batch.teacher_logits()?;
        let mut to = vec![f32::from_bits(0xdead_beef); teacher.tokens()];
        let mut buffers =
            vec![input("teacher", teacher.elements()), Buffer::output("margins", &mut to)];
        buffers.extend(batch.labels().map(labels));
        let layout = Layout { capacity: teacher.tokens() };
        let workspace = self.workspace(layout, &mut buffers);
        let (tokens, vocab, teacher) = (teacher.tokens(), teacher.vocab(), raw(teacher));
        buffers.extend(batch.temperatures().map(|own| Buffer::input("temperatures", own)));
        let of = RawTeacher {
            tokens,
            vocab,
            teacher,
            labels: batch.labels().map(raw_labels),
            temperatures: batch.temperatures().map(address),
        };
        let memory = Memory::new(layout, address(&workspace));
        let launch = stages::margins(objective, &of, address(&to), &self.device, memory)?;
        Ok((to, self.alone(launch, buffers)?))
    }

    /// The hard tokens of [`select_hard`](crate::select_hard), and what was read and written.
    ///
    /// # Errors
    /// If the ratio is not in [0, 1], or the kernel does what it must not.
    ///
    /// # Panics
    /// If offsets are out of order.
    pub fn select_hard(
        self,
        margins: &[f32],
        valid: Option<&[bool]>,
        hard_ratio: f64,
        sequences: Option<&[usize]>,
    ) -> Result<(Vec<bool>, Traffic)> {
        let tokens = margins.len();
        let mut hard = vec![0xaa_u8; tokens];
        let sequences: Option<Vec<i64>> =
            sequences.map(|offsets| offsets.iter().map(|&offset| offset as i64).collect());
        let mut buffers =
            vec![Buffer::input("margins", margins), Buffer::output("hard", &mut hard)];
        buffers.extend(valid.map(|valid| Buffer::input("valid", valid)));
        buffers.extend(sequences.as_ref().map(|offsets| Buffer::input("offsets", offsets)));
        let selection = RawSelection {
            tokens,
            margins: address(margins),
            valid: valid.map(address),
            sequences: sequences.as_ref().map(|offsets| (address(offsets), offsets.len() - 1)),
            rule: SelectionRule::TopK,
            hard: address(&hard),
        };
        let layout = Layout { capacity: tokens };
        let workspace = self.workspace(layout, &mut buffers);
        let memory = Memory::new(layout, address(&workspace));
        let launch = stages::selection(&selection, hard_ratio, &self.device, memory)?;
        let traffic = self.alone(launch, buffers)?;
        let hard = hard.into_iter().map(|byte| {
            assert!(byte < 2, "a token was left out, or marked by {byte:#x}");
            byte == 1
        });
        Ok((hard.collect(), traffic))
    }

    fn alone(self, launch: Option<Launch>, mut buffers: Vec<Buffer>) -> Result<Traffic> {
        let Some(launch) = launch else { return Ok(Vec::new()) };
        self.launch(&launch, &mut buffers)?;
        Ok(vec![(launch.kernel, buffers)])
    }

    /// The entropies of [`cpu::token_entropies`](crate::cpu::token_entropies), and what was read and written.
    ///
    /// # Errors
    /// If the temperature is outside its domain, or the kernel does what it must not.
    pub fn token_entropies(self, logits: Logits, temperature: f64) -> Result<(Vec<f32>, Traffic)> {
        let (tokens, vocab) = (logits.tokens(), logits.vocab());
        let mut to = vec![f32::from_bits(0xdead_beef); tokens];
        let buffers =
            vec![input("logits", logits.elements()), Buffer::output("entropies", &mut to)];
        let of = RawEntropies { tokens, vocab, logits: raw(logits), temperature, to: address(&to) };
        let launch = stages::token_entropies(&self.device, &of)?;
        Ok((to, self.alone(launch, buffers)?))
    }

    /// A gradient times a number, in place, and what was read and written.
    ///
    /// # Errors
    /// If it is too large, or as [`forward`].
    pub fn scale_gradient(self, gradient: &mut LogitsMut, factor: f32) -> Result<Traffic> {
        let view = gradient.as_logits();
        let factor = [factor];
        let launch = stages::scale_gradient(
            &self.device,
            raw(view),
            view.tokens(),
            view.vocab(),
            address(&factor),
        )?;
        let Some(launch) = launch else { return Ok(Vec::new()) };
        let mut buffers = vec![
            Buffer { writable: true, ..input("gradient", view.elements()) },
            Buffer::input("factor", &factor),
        ];
        self.launch(&launch, &mut buffers)?;
        Ok(vec![(launch.kernel, buffers)])
    }

    /// The unfused baseline of the benchmarks, [`unfused`](crate::unfused): loss and gradient of the paper's
    /// ATKD, and how many kernels it took.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn run_unfused(
        self,
        batch: &Batch,
        student: Logits,
        gradient: &mut LogitsMut,
    ) -> Result<(f64, usize)> {
        let (tokens, vocab) = (student.tokens(), student.vocab());
        let Some(Labels::I64(labels)) = batch.labels() else { return Err(Error::NoLabels) };
        let memory = device::Memory { tokens, vocab };
        let mut work = vec![u128::MAX; memory.bytes().div_ceil(16)];
        work[..size_of::<atkd_summary>().div_ceil(16)].fill(0);
        let call = RawCall {
            tokens,
            vocab,
            teacher: raw(batch.teacher_logits()?),
            student: raw(student),
            gradient: Some(raw(gradient.as_logits())),
            gradient_padding: 0,
            labels: Some(RawLabels::I64(address(labels))),
            sequences: None,
            margins: None,
            hard: None,
            token_weights: None,
            temperatures: None,
            upstream: None,
        };
        let mut buffers = [
            input("teacher", batch.teacher_logits()?.elements()),
            input("student", student.elements()),
            Buffer::input("labels", labels),
            Buffer { writable: true, ..input("gradient", gradient.as_logits().elements()) },
            Buffer::output("memory", &mut work),
        ];
        let launches = device::launches(&call, &self.device, address(&work))?;
        for launch in &launches {
            self.launch(launch, &mut buffers)?;
        }
        // SAFETY: the loss lies in this memory.
        let loss = unsafe { *work.as_ptr().cast::<u8>().add(memory.loss()).cast::<f32>() };
        Ok((loss.into(), launches.len()))
    }

    fn launch(self, launch: &Launch, buffers: &mut [Buffer]) -> Result<()> {
        let parameters = launch.parameters.as_ptr();
        // SAFETY: the block is the kernel's.
        unsafe { self.simulate(launch.kernel, launch.shape, parameters, buffers) }
            .map_err(|message| Error::Simulation { message })
    }

    /// Runs a kernel by its name, in as many clusters as `shape` has, of no more blocks and threads than this
    /// simulation has.
    ///
    /// # Errors
    /// As [`run_kernel`].
    ///
    /// # Safety
    /// As [`run_kernel`].
    pub unsafe fn simulate(
        self,
        kernel: &str,
        planned: LaunchShape,
        parameters: *const c_void,
        buffers: &mut [Buffer],
    ) -> Result<(), String> {
        let mut shape = planned;
        let shrinks = find_kernel(kernel).map_or(Shrinks::Never, |kernel| kernel.shrinks);
        if shrinks != Shrinks::Never {
            let clusters = shape.grid / shape.cluster;
            shape.cluster = shape.cluster.min(self.cluster);
            shape.grid = clusters * shape.cluster;
        }
        if shrinks == Shrinks::BlocksAndClusters {
            shape.block = shape.block.min(self.block);
        }
        // SAFETY: the caller vouches for the block.
        unsafe { run_kernel(kernel, shape, self.seed, parameters, buffers) }
    }
}

/// Runs one kernel by its name, as a driver would.
///
/// # Errors
/// If the kernel does something wrong, which the message says, or there is no such kernel.
///
/// # Safety
/// `parameters` is the kernel's parameter block. An access outside the buffers is an error.
pub unsafe fn run_kernel(
    kernel: &str,
    shape: LaunchShape,
    seed: u64,
    parameters: *const c_void,
    buffers: &mut [Buffer],
) -> Result<(), String> {
    // SAFETY: the caller vouches for it.
    unsafe { table::simulate(kernel, shape, seed, parameters, buffers) }
}

/// The kernel called so, if there is one.
pub fn find_kernel(name: &str) -> Option<&'static Kernel> {
    KERNELS.iter().find(|kernel| kernel.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Dtype;
    use crate::Target;
    use crate::device::workspace::STATES_BYTES;
    use crate::params::{
        ATKD_EASY, ATKD_HARD, ATKD_IGNORED, ATKD_MEAN, ATKD_TOP_K, atkd_batch, atkd_coefficient,
        atkd_select_hard, atkd_token_terms,
    };
    use crate::plan::{HardTokens, Problem};

    /// On the device of simulations, a batch in bfloat16.
    fn planned(tokens: usize) -> Plan {
        let problem = Problem {
            tokens,
            vocab: 32_000,
            teacher: Dtype::Bf16,
            student: Dtype::Bf16,
            gradient: Dtype::Bf16,
            sum_at_1: false,
            aligned_alike: true,
            scopes: 1,
            target: Target::Label,
            hard: HardTokens::Selected,
            gradient_depends_on_hard: true,
            needs_group_sizes: false,
            in_place: false,
        };
        Plan::new(&Simulation::default().device, &problem, None)
    }

    /// The selection of as many tokens as it is made for, of which a thread sees hundreds.
    #[test]
    fn selection_of_four_million_tokens() {
        const TOKENS: usize = 1 << 22;
        let mut random = fastrand::Rng::with_seed(4);
        // Few distinct keys, so that the last hard one has many equals; some tokens are ignored.
        let mut keys: Vec<u32> =
            (0..TOKENS).map(|_| random.u32(..50_000).saturating_sub(1000) << 12).collect();
        let mut groups = vec![0xaa_u8; TOKENS];
        // SAFETY: plain numbers.
        let mut summary: [atkd_summary; 1] = unsafe { std::mem::zeroed() };
        let mut kept_threshold = [7_u32];
        let mut states = vec![7_u128; STATES_BYTES / 16];
        // SAFETY: numbers and pointers, for which 0 is a value.
        let mut batch: atkd_batch = unsafe { std::mem::zeroed() };
        batch.keys = keys.as_mut_ptr();
        batch.groups = groups.as_mut_ptr();
        batch.summary = summary.as_mut_ptr();
        batch.tokens = TOKENS as u32;
        let parameters = atkd_select_hard {
            batch,
            margins: std::ptr::null(),
            valid: std::ptr::null(),
            offsets: std::ptr::null(),
            mispredicted: std::ptr::null_mut(),
            states: states.as_mut_ptr().cast(),
            kept_threshold: kept_threshold.as_mut_ptr(),
            hard_to: std::ptr::null_mut(),
            hard_ratio: 0.3,
            scopes: 1,
            count: 1,
            rule: ATKD_TOP_K,
            reserved: 0,
        };
        let mut buffers = [
            Buffer::output("keys", &mut keys),
            Buffer::output("groups", &mut groups),
            Buffer::output("summary", &mut summary),
            Buffer::output("states", &mut states),
            Buffer::output("kept threshold", &mut kept_threshold),
        ];
        let seed = Simulation::default().seed;
        let shape = planned(TOKENS).select;
        assert_eq!(shape, LaunchShape { grid: 8, block: 1024, cluster: 8, team: 1, shared: 0 });
        let parameters = (&raw const parameters).cast();
        // SAFETY: that is the kernel's block, and the buffers are what it points to.
        unsafe { run_kernel("select_hard", shape, seed, parameters, &mut buffers) }.unwrap();

        let mut order: Vec<usize> = (0..TOKENS).filter(|&i| keys[i] != 0).collect();
        let (valid, wanted) = (order.len(), (0.3 * order.len() as f64).ceil() as usize);
        order.sort_by_key(|&i| (std::cmp::Reverse(keys[i]), i));
        let mut expected: Vec<u8> =
            keys.iter().map(|&key| if key == 0 { ATKD_IGNORED } else { ATKD_EASY } as u8).collect();
        order[..wanted].iter().for_each(|&i| expected[i] = ATKD_HARD as u8);
        assert!(groups == expected);
        assert_eq!(kept_threshold[0], keys[order[wanted - 1]]);
        let summary = summary[0];
        assert_eq!((summary.counted_valid, summary.counted_hard), (valid as u32, wanted as u32));
    }

    /// More tokens than threads, of which each block sums some, and the last to be done the blocks' sums.
    #[test]
    fn losses_of_many_tokens() {
        const TOKENS: usize = 300_000;
        let mut random = fastrand::Rng::with_seed(5);
        let groups: Vec<u8> =
            (0..TOKENS).map(|_| random.u32(ATKD_IGNORED..=ATKD_HARD) as u8).collect();
        let dkd_before: Vec<f32> = (0..TOKENS).map(|_| random.f32()).collect();
        let shape = planned(TOKENS).terms;
        assert_eq!(shape, LaunchShape { grid: 1024, block: 256, cluster: 1, team: 1, shared: 0 });
        let run = |seed, shape: LaunchShape| {
            let mut groups = groups.clone();
            // Both margins 0, where TKD is 0: what remains is DKD.
            let [mut uncertainty, mut tkd] = [vec![0_f32; TOKENS], vec![0_f32; TOKENS]];
            // In the units of that column.
            let mut dkd: Vec<f32> = dkd_before.iter().map(|dkd| dkd / 2_f32.powi(64)).collect();
            let mut loss = vec![0_f64; TOKENS];
            let mut sums = vec![f64::NAN; shape.grid as usize];
            let [mut loss_to, mut dkd_to] = [vec![0_f32], vec![0_f32; TOKENS]];
            // SAFETY: plain numbers and pointers.
            let mut summary: [atkd_summary; 1] = unsafe { std::mem::zeroed() };
            summary[0].counted_valid = 10;
            // SAFETY: as above.
            let mut parameters: atkd_token_terms = unsafe { std::mem::zeroed() };
            parameters.batch.groups = groups.as_mut_ptr();
            parameters.batch.summary = summary.as_mut_ptr();
            parameters.batch.tokens = TOKENS as u32;
            parameters.batch.vocab = 1;
            parameters.objective.dkd = [atkd_coefficient { value: 1.0, times_uncertainty: 0 }; 2];
            parameters.uncertainty = uncertainty.as_mut_ptr();
            parameters.tkd = tkd.as_mut_ptr();
            parameters.dkd = dkd.as_mut_ptr();
            parameters.loss = loss.as_mut_ptr();
            parameters.sums = sums.as_mut_ptr();
            parameters.reduced_loss_to = loss_to.as_mut_ptr();
            parameters.dkd_to = dkd_to.as_mut_ptr();
            (parameters.scale, parameters.blocks) = (1.0, shape.grid);
            parameters.reduction = ATKD_MEAN;
            let mut buffers = [
                Buffer::output("groups", &mut groups),
                Buffer::output("summary", &mut summary),
                Buffer::output("uncertainty", &mut uncertainty),
                Buffer::output("tkd", &mut tkd),
                Buffer::output("dkd", &mut dkd),
                Buffer::output("loss", &mut loss),
                Buffer::output("sums", &mut sums),
                Buffer::output("loss to", &mut loss_to),
                Buffer::output("dkd to", &mut dkd_to),
            ];
            let parameters = (&raw const parameters).cast();
            // SAFETY: that is the kernel's block, and the buffers are what it points to.
            unsafe { run_kernel("token_terms", shape, seed, parameters, &mut buffers) }.unwrap();
            assert!(
                uncertainty.iter().zip(&groups).all(|(u, group)| *u == f32::from(*group > 0) / 2.0)
            );
            assert!(dkd_to == dkd);
            assert_eq!(loss_to, [summary[0].loss as f32]);
            assert_eq!((summary[0].valid, summary[0].counted_valid, summary[0].summed), (10, 0, 0));
            summary[0].loss
        };
        let losses = dkd_before.iter().zip(&groups).filter(|(_, group)| **group > 0);
        let expected = losses.map(|(loss, _)| f64::from(*loss)).sum::<f64>() / 10.0;
        let of_small_blocks = LaunchShape { grid: 7, block: 64, ..shape };
        for (seed, shape) in [(1, shape), (2, shape), (3, of_small_blocks)] {
            let loss = run(seed, shape);
            assert!((loss - expected).abs() < 1e-12 * expected, "{loss} {expected}");
            assert_eq!(run(seed + 10, shape), loss);
        }
    }
}
