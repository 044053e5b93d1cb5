//! The CUDA backend on a device, against float64. Without a driver or a device, or in a build without
//! kernels, every test says on standard error that it was skipped. `simt-driver` runs all of them on a
//! simulated driver.

#[path = "cuda/head.rs"]
mod head;
#[cfg(feature = "nccl")]
#[path = "cuda/nccl.rs"]
mod nccl;
#[path = "cuda/session.rs"]
mod session;
#[path = "cuda/shards.rs"]
mod shards;
#[path = "cuda/sparse.rs"]
mod sparse;
#[path = "stages/mod.rs"]
mod stages;

use std::io::Write;
use std::sync::Arc;

use atkd::battery::compare::{RELATIVE, Worst, gradient_floor, gradient_within};
use atkd::cuda::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use atkd::cuda::cudarc::driver::{
    CudaContext, CudaGraph, CudaSlice, CudaStream, CudaView, CudaViewMut, DevicePtr, DevicePtrMut,
    DeviceRepr,
};
use atkd::cuda::unfused::Unfused;
use atkd::cuda::{
    self, DeviceBatch, DeviceLabels, DeviceLogits, DeviceLogitsMut, DeviceTokens, Kernels, RawCall,
    RawLabels, RawLogits, RawOutput, Workspace,
};
use atkd::plan::{Preference, RowKernel};
use atkd::{
    Batch, Dtype, Error, Logits, LogitsMut, Objective, Output, Reduction, Result, Strides, Target,
    battery, reference,
};
use half::bf16;

pub struct Gpu {
    pub context: Arc<CudaContext>,
    pub stream: Arc<CudaStream>,
    pub kernels: Arc<Kernels>,
}

impl Gpu {
    fn try_new(ordinal: usize) -> Result<Self> {
        let context = cuda::context(ordinal)?;
        let kernels = Kernels::load(&context)?;
        Ok(Self { stream: context.default_stream(), context, kernels })
    }

    /// The first device; `None`, and loud, where there is nothing to test on.
    pub fn new() -> Option<Self> {
        Self::or_skip(0)
    }

    pub fn or_skip(ordinal: usize) -> Option<Self> {
        match Self::try_new(ordinal) {
            Ok(gpu) => Some(gpu),
            Err(error @ (Error::NoDriver | Error::NoDevice { .. } | Error::NoKernels { .. })) => {
                let test = std::thread::current();
                let line = format!("SKIPPED: {}: {error}\n", test.name().unwrap_or("a test"));
                // At once, and not by a macro whose output the test runner swallows.
                let _ = std::io::stderr().write_all(line.as_bytes());
                None
            }
            Err(error) => panic!("{error}"),
        }
    }

    fn upload<T: DeviceRepr>(&self, slice: &[T]) -> CudaSlice<T> {
        self.stream.clone_htod(slice).unwrap()
    }
}

const _: fn() = || {
    fn shared_between_threads<T: Send + Sync>() {}
    shared_between_threads::<Kernels>();
    shared_between_threads::<Workspace>();
};

/// Logits and labels on the host.
pub struct Input {
    tokens: usize,
    vocab: usize,
    teacher: Vec<bf16>,
    student: Vec<bf16>,
    labels: Vec<i64>,
}

impl Input {
    pub fn new(tokens: usize, vocab: usize, seed: u64) -> Self {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut logits = || -> Vec<bf16> {
            (0..tokens * vocab).map(|_| bf16::from_f32(6.0 * random.f32())).collect()
        };
        let (teacher, student) = (logits(), logits());
        let labels = (0..tokens).map(|_| random.i64(0..vocab as i64)).collect();
        Self { tokens, vocab, teacher, student, labels }
    }

    fn view<'a>(&self, logits: &'a [bf16]) -> Logits<'a> {
        Logits::new(logits, self.tokens, self.vocab).unwrap()
    }

    fn batch(&self) -> Batch<'_> {
        Batch::new(self.view(&self.teacher), &self.labels).unwrap()
    }

    fn reference(&self, objective: &Objective, batch: &Batch) -> (Output, Vec<f64>) {
        reference::forward_backward(objective, batch, self.view(&self.student)).unwrap()
    }

    /// That the output and the gradient are this input's.
    #[track_caller]
    fn check(&self, objective: &Objective, (output, gradient): &(Output, Vec<bf16>)) {
        let exact = self.reference(objective, &self.batch());
        check_output(output, &exact.0);
        check_gradient(objective, gradient, &exact, self.vocab);
    }
}

/// An output in place with the margins of one beside: in place they are of another kernel, which may round them
/// otherwise.
#[track_caller]
fn with_margins_of(beside: &Output, mut in_place: Output) -> Output {
    for (token, beside) in in_place.tokens.iter_mut().zip(&beside.tokens) {
        let (actual, expected) = (token.margin, beside.margin);
        assert!((actual - expected).abs() <= 5e-7 * (1.0 + expected.abs()), "{actual} {expected}");
        token.margin = expected;
    }
    in_place
}

#[track_caller]
fn check_output(output: &Output, exact: &Output) {
    let mut worst = Worst::none();
    worst.add_output(output, exact, RELATIVE, 1.0);
    assert!(worst.ratio <= 1.0, "{}", worst.detail);
}

#[track_caller]
fn check_gradient(
    objective: &Objective,
    gradient: &[bf16],
    exact: &(Output, Vec<f64>),
    vocab: usize,
) {
    let (exact_output, exact) = exact;
    assert_eq!(gradient.len(), exact.len());
    let weight = objective.distillation_scale() + objective.ce_weight();
    let floor = gradient_floor(objective, weight, exact_output);
    let mut worst = Worst::none();
    for (i, (row, exact)) in gradient.chunks(vocab).zip(exact.chunks(vocab)).enumerate() {
        let largest = exact.iter().fold(0.0_f64, |largest, g| largest.max(g.abs()));
        for (j, (&actual, &exact)) in row.iter().zip(exact).enumerate() {
            let allowed = gradient_within(Dtype::Bf16, exact, largest, floor);
            worst.add(|| format!("gradient[{i}, {j}]"), actual.to_f64(), exact, allowed);
        }
    }
    assert!(worst.ratio <= 1.0, "{}", worst.detail);
}

/// An input on the device, and what is computed from it.
pub struct Loaded {
    stream: Arc<CudaStream>,
    tokens: usize,
    vocab: usize,
    pub teacher: CudaSlice<bf16>,
    student: CudaSlice<bf16>,
    gradient: CudaSlice<bf16>,
    labels: CudaSlice<i64>,
    pub workspace: Workspace,
}

impl Loaded {
    pub fn new(gpu: &Gpu, stream: &Arc<CudaStream>, input: &Input) -> Self {
        let upload = |logits: &[bf16]| stream.clone_htod(logits).unwrap();
        Self {
            stream: stream.clone(),
            tokens: input.tokens,
            vocab: input.vocab,
            teacher: upload(&input.teacher),
            student: upload(&input.student),
            gradient: upload(&vec![bf16::NAN; input.tokens * input.vocab]),
            labels: stream.clone_htod(&input.labels).unwrap(),
            workspace: Workspace::new(&gpu.kernels, stream, input.tokens).unwrap(),
        }
    }

    fn replace(&mut self, input: &Input) {
        self.stream.memcpy_htod(&input.teacher, &mut self.teacher).unwrap();
        self.stream.memcpy_htod(&input.student, &mut self.student).unwrap();
        self.stream.memcpy_htod(&input.labels, &mut self.labels).unwrap();
    }

    /// The loss as it lies on the device.
    pub fn loss(&self) -> f32 {
        self.stream.clone_dtoh(&self.workspace.loss()).unwrap()[0]
    }

    pub fn forward(&mut self, objective: &Objective) -> Result<()> {
        let (tokens, vocab) = (self.tokens, self.vocab);
        let batch =
            DeviceBatch::new(DeviceLogits::new(&self.teacher, tokens, vocab)?, &self.labels)?;
        let student = DeviceLogits::new(&self.student, tokens, vocab)?;
        self.workspace.forward(&self.stream, objective, &batch, &student)
    }

    pub fn backward(
        &mut self,
        objective: &Objective,
        upstream: Option<&CudaView<f32>>,
    ) -> Result<()> {
        let (tokens, vocab) = (self.tokens, self.vocab);
        let batch =
            DeviceBatch::new(DeviceLogits::new(&self.teacher, tokens, vocab)?, &self.labels)?;
        let student = DeviceLogits::new(&self.student, tokens, vocab)?;
        let to = DeviceLogitsMut::new(&mut self.gradient, tokens, vocab)?;
        self.workspace.forward_backward(&self.stream, objective, &batch, &student, to, upstream)
    }

    pub fn in_place(&mut self, objective: &Objective) -> Result<()> {
        let (tokens, vocab) = (self.tokens, self.vocab);
        let batch =
            DeviceBatch::new(DeviceLogits::new(&self.teacher, tokens, vocab)?, &self.labels)?;
        let student = DeviceLogitsMut::new(&mut self.student, tokens, vocab)?;
        self.workspace.forward_backward_in_place(&self.stream, objective, &batch, student, None)
    }

    fn read(&mut self) -> (Output, Vec<bf16>) {
        let output = self.workspace.read(&self.stream).unwrap();
        (output, self.stream.clone_dtoh(&self.gradient).unwrap())
    }

    /// The call by address.
    pub fn raw(&self) -> RawCall {
        let address = |slice: &CudaSlice<bf16>| slice.device_ptr(&self.stream).0;
        let logits =
            |address| RawLogits { address, dtype: Dtype::Bf16, strides: self.vocab.into() };
        RawCall {
            tokens: self.tokens,
            vocab: self.vocab,
            teacher: logits(address(&self.teacher)),
            student: logits(address(&self.student)),
            gradient: Some(logits(address(&self.gradient))),
            gradient_padding: 0,
            labels: Some(RawLabels::I64(self.labels.device_ptr(&self.stream).0)),
            sequences: None,
            margins: None,
            hard: None,
            token_weights: None,
            temperatures: None,
            upstream: None,
        }
    }

    pub fn launch(&mut self, objective: &Objective, call: &RawCall) -> Result<()> {
        // SAFETY: the addresses are of this struct's memory, used on one stream.
        unsafe { self.workspace.launch(&self.stream, objective, call, &RawOutput::default()) }
    }
}

/// One for a row to a block, and one for rows that are shared by the blocks of a cluster where the L2 cache is
/// small.
const VOCABS: [usize; 2] = [33, 7001];

#[test]
fn the_backend_passes_the_battery() {
    let Some(gpu) = Gpu::new() else { return };
    let checks = battery::run(
        battery::Bounds::Kernels,
        |objective, batch, student, gradient| {
            gpu.kernels.forward_backward(objective, batch, student, gradient)
        },
        |_| {},
    );
    battery::assert_all_pass(&checks);
}

#[test]
fn in_place_beside_and_again_are_the_same_bits() {
    let Some(gpu) = Gpu::new() else { return };
    for vocab in VOCABS {
        let input = Input::new(6, vocab, 1);
        for objective in [Objective::default(), Objective::kl().with_ce_weight(0.5).unwrap()] {
            let mut loaded = Loaded::new(&gpu, &gpu.stream, &input);
            loaded.backward(&objective, None).unwrap();
            let first = loaded.read();
            input.check(&objective, &first);
            loaded.backward(&objective, None).unwrap();
            assert_eq!(loaded.read(), first);
            loaded.in_place(&objective).unwrap();
            let output = loaded.workspace.read(&gpu.stream).unwrap();
            let output = with_margins_of(&first.0, output);
            assert_eq!((output, gpu.stream.clone_dtoh(&loaded.student).unwrap()), first);
        }
    }
}

/// In place, where margins are of a kernel of their own: of more rows than its blocks do at once, by blocks of 1
/// warp, of 3 and of 8.
#[test]
fn margins_in_place_of_many_rows() {
    let Some(gpu) = Gpu::new() else { return };
    let multiprocessors = gpu.kernels.device().multiprocessors as usize;
    for (vocab, at_once) in [(700, 40), (5000, 13), (16_400, 5)] {
        let input = Input::new(5 * at_once * multiprocessors / 2, vocab, 3);
        let mut loaded = Loaded::new(&gpu, &gpu.stream, &input);
        loaded.backward(&Objective::default(), None).unwrap();
        let (beside, _) = loaded.read();
        loaded.in_place(&Objective::default()).unwrap();
        with_margins_of(&beside, loaded.workspace.read(&gpu.stream).unwrap());
    }
}

/// Whichever kernel does the rows, and for a plan that would choose another; with more tokens than run at
/// once, some of them ignored, and a first guess that is wrong.
#[test]
fn every_kernel_for_rows() {
    // The simulated device 3 has no clusters.
    for (device, row_kernel, team) in [
        (0, RowKernel::Resident, 0),
        (0, RowKernel::Pipelined, 0),
        (0, RowKernel::Pipelined, 1),
        (0, RowKernel::Pipelined, 3),
        (0, RowKernel::Pipelined, 32),
        (0, RowKernel::PipelinedWide, 0),
        (0, RowKernel::PipelinedWide, 3),
        (0, RowKernel::Stream, 0),
        (3, RowKernel::Stream, 0),
        (3, RowKernel::Stream, 4),
    ] {
        let Some(gpu) = Gpu::or_skip(device) else { continue };
        let preferred = Some(Preference { row_kernel, team });
        let kernels = Kernels::load_preferring(&gpu.context, preferred).unwrap();
        let gpu = Gpu { context: gpu.context.clone(), stream: gpu.stream.clone(), kernels };
        for (tokens, vocab) in [(900, 40), (7, 1003), (3, 20_011)] {
            let mut input = Input::new(tokens, vocab, 5);
            for i in (0..tokens).step_by(4) {
                input.labels[i] = -100;
            }
            let mut loaded = Loaded::new(&gpu, &gpu.stream, &input);
            let mut first = None;
            for _ in 0..2 {
                loaded.backward(&Objective::default(), None).unwrap();
                let result = loaded.read();
                input.check(&Objective::default(), &result);
                assert_eq!(*first.get_or_insert(result.clone()), result, "{row_kernel} {vocab}");
            }
        }
    }
}

#[test]
fn the_loss_alone_is_the_loss_beside_the_gradient() {
    let Some(gpu) = Gpu::new() else { return };
    for vocab in VOCABS {
        let input = Input::new(5, vocab, 2);
        for objective in [Objective::default(), Objective::kl()] {
            let mut loaded = Loaded::new(&gpu, &gpu.stream, &input);
            loaded.forward(&objective).unwrap();
            let (forward, untouched) = loaded.read();
            assert!(untouched.iter().all(|g| g.is_nan()));
            assert_eq!(loaded.workspace.read_loss(&gpu.stream).unwrap(), forward.loss);
            loaded.backward(&objective, None).unwrap();
            assert_eq!(loaded.read().0, forward);
            let by_host =
                gpu.kernels.forward(&objective, &input.batch(), input.view(&input.student));
            assert_eq!(by_host.unwrap(), forward);
        }
    }
}

#[test]
fn labels_of_32_bits() {
    let Some(gpu) = Gpu::new() else { return };
    let mut input = Input::new(9, 40, 3);
    input.labels[2] = -100;
    let narrow: Vec<i32> = input.labels.iter().map(|&label| label as i32).collect();
    let objective = Objective::default();
    let mut loaded = Loaded::new(&gpu, &gpu.stream, &input);
    let labels = gpu.upload(&narrow);
    let teacher = DeviceLogits::new(&loaded.teacher, 9, 40).unwrap();
    let batch = DeviceBatch::new(teacher, &labels).unwrap();
    let student = DeviceLogits::new(&loaded.student, 9, 40).unwrap();
    let to = DeviceLogitsMut::new(&mut loaded.gradient, 9, 40).unwrap();
    let workspace = &mut loaded.workspace;
    workspace.forward_backward(&gpu.stream, &objective, &batch, &student, to, None).unwrap();
    input.check(&objective, &loaded.read());

    let batch = Batch::new(input.view(&input.teacher), &narrow).unwrap();
    let mut gradient = vec![bf16::NAN; 9 * 40];
    let to = LogitsMut::new(&mut gradient, 9, 40).unwrap();
    let student = input.view(&input.student);
    let output = gpu.kernels.forward_backward(&objective, &batch, student, to).unwrap();
    input.check(&objective, &(output, gradient));
}

#[test]
fn an_upstream_gradient_on_the_device() {
    let Some(gpu) = Gpu::new() else { return };
    let input = Input::new(4, 300, 4);
    let mut loaded = Loaded::new(&gpu, &gpu.stream, &input);
    let upstream = gpu.upload(&[7.0_f32, -1.25]);
    let half = Objective::default().with_upstream_gradient(2.0).unwrap();
    loaded.backward(&half, Some(&upstream.slice(1..))).unwrap();
    let whole = Objective::default().with_upstream_gradient(-2.5).unwrap();
    input.check(&whole, &loaded.read());
    let error = loaded.backward(&half, Some(&upstream.as_view())).unwrap_err();
    assert_eq!(error, Error::Upstream { actual: 2 });
}

#[test]
fn sequences_on_the_device() {
    let Some(gpu) = Gpu::new() else { return };
    let input = Input::new(10, 50, 5);
    let objective = Objective::default().with_hard_ratio(0.4).unwrap();
    let mut loaded = Loaded::new(&gpu, &gpu.stream, &input);
    let mut run = |labels: &[i64], offsets: &[i64]| {
        let offsets = gpu.upload(offsets);
        gpu.stream.memcpy_htod(labels, &mut loaded.labels).unwrap();
        let teacher = DeviceLogits::new(&loaded.teacher, 10, 50).unwrap();
        let batch = DeviceBatch::new(teacher, &loaded.labels).unwrap();
        let batch = batch.with_sequences(offsets.as_view()).unwrap();
        let student = DeviceLogits::new(&loaded.student, 10, 50).unwrap();
        loaded.workspace.forward(&gpu.stream, &objective, &batch, &student).unwrap();
        let is_nan = loaded.loss().is_nan();
        let output = loaded.workspace.read(&gpu.stream);
        assert_eq!(is_nan, output.is_err());
        output
    };
    let exact = |offsets: &[usize]| {
        input.reference(&objective, &input.batch().with_sequences(offsets).unwrap()).0
    };
    let labels = &input.labels;
    check_output(&run(labels, &[0, 0, 3, 3, 10, 10]).unwrap(), &exact(&[0, 0, 3, 3, 10, 10]));
    // Tokens that no sequence covers are left as the call before had them, when they were not ignored.
    let ignored = [-100; 10];
    for (offsets, sequence) in [
        (&[1, 4, 10][..], 0),
        (&[0, 4, 9], 1),
        (&[0, 7, 3, 10], 1),
        (&[0, 4, 11, 10], 1),
        (&[0, -1, 10], 0),
        (&[i64::MIN, i64::MAX], 0),
    ] {
        for labels in [&labels[..], &ignored] {
            let error = run(labels, offsets).unwrap_err();
            assert_eq!(error, Error::DeviceSequences { sequence }, "{offsets:?}");
        }
        check_output(&run(labels, &[0, 5, 10]).unwrap(), &exact(&[0, 5, 10]));
    }
}

/// They decide which tokens are hard, and nothing else.
#[test]
fn margins_from_the_caller() {
    let Some(gpu) = Gpu::new() else { return };
    let mut input = Input::new(6, 200, 6);
    input.labels[1] = -100;
    let lambda = 0.3;
    let objective = Objective::atkd(lambda).unwrap().with_hard_ratio(0.3).unwrap();
    let mut loaded = Loaded::new(&gpu, &gpu.stream, &input);
    let margins = gpu.upload(&[0.0_f32, 9.0, -3.0, 2.0, f32::NAN, 2.0]);
    let teacher = DeviceLogits::new(&loaded.teacher, 6, 200).unwrap();
    let batch = DeviceBatch::new(teacher, &loaded.labels).unwrap();
    let batch = batch.with_margins(margins.as_view()).unwrap();
    let student = DeviceLogits::new(&loaded.student, 6, 200).unwrap();
    loaded.workspace.forward(&gpu.stream, &objective, &batch, &student).unwrap();
    let output = loaded.workspace.read(&gpu.stream).unwrap();
    let hard = output.tokens.iter().map(|token| token.hard);
    assert_eq!(hard.collect::<Vec<_>>(), [false, false, false, true, false, true]);
    let (exact, _) = input.reference(&objective, &input.batch());
    for (i, (token, exact)) in output.tokens.iter().zip(&exact.tokens).enumerate() {
        let loss = match (exact.valid, token.hard) {
            (false, _) => 0.0,
            (true, false) => lambda * exact.dkd,
            (true, true) => (1.0 - lambda) * (exact.tkd + exact.dkd),
        };
        assert!((token.loss - loss).abs() <= 2e-6 * (1.0 + loss), "{i}: {} {loss}", token.loss);
    }
}

/// Margins, a selection among them, and calls that are told of it: the same as calls that select by themselves.
#[test]
fn a_selection_apart_from_the_loss() {
    let Some(gpu) = Gpu::new() else { return };
    let (stream, objective) = (&gpu.stream, Objective::default());
    let mut input = Input::new(11, 300, 7);
    input.labels[4] = -100;
    let mut loaded = Loaded::new(&gpu, stream, &input);
    loaded.backward(&objective, None).unwrap();
    let (expected, gradient) = loaded.read();

    let mut margins: CudaSlice<f32> = stream.alloc_zeros(11).unwrap();
    let teacher = DeviceLogits::new(&loaded.teacher, 11, 300).unwrap();
    let batch = DeviceBatch::new(teacher, &loaded.labels).unwrap();
    let workspace = &mut loaded.workspace;
    workspace.teacher_margins(stream, &objective, &batch, margins.as_view_mut()).unwrap();
    for (margin, token) in stream.clone_dtoh(&margins).unwrap().into_iter().zip(&expected.tokens) {
        let (margin, exact) = (f64::from(margin), token.margin);
        assert!(margin == exact || (margin - exact).abs() <= 5e-7 * (1.0 + exact.abs()));
    }
    // The loss stays, its tokens are gone.
    assert_eq!(workspace.read_loss(stream).unwrap(), expected.loss);
    assert_eq!(workspace.read(stream).unwrap().tokens, []);

    let valid = gpu.upload(&input.labels.iter().map(|&l| u8::from(l != -100)).collect::<Vec<_>>());
    let mut hard: CudaSlice<u8> = stream.clone_htod(&[7_u8; 11]).unwrap();
    let of_valid = Some(valid.as_view());
    let (margins, of_valid) = (margins.as_view(), of_valid.as_ref());
    workspace.select_hard(stream, &margins, of_valid, 0.5, None, hard.as_view_mut()).unwrap();
    let selected: Vec<u8> = expected.tokens.iter().map(|token| token.hard.into()).collect();
    assert_eq!(stream.clone_dtoh(&hard).unwrap(), selected);
    let offsets = gpu.upload(&[0_i64, 3, 3, 11]);
    let sequences = Some(offsets.as_view());
    let mut by_sequence: CudaSlice<u8> = stream.alloc_zeros(11).unwrap();
    let to = by_sequence.as_view_mut();
    workspace.select_hard(stream, &margins, of_valid, 0.3, sequences.as_ref(), to).unwrap();
    let host = stream.clone_dtoh(&margins).unwrap();
    let valid_on_host: Vec<bool> = input.labels.iter().map(|&label| label != -100).collect();
    let by_host =
        atkd::select_hard(&host, Some(&valid_on_host), 0.3, Some(&[0, 3, 3, 11])).unwrap();
    assert_eq!(
        stream.clone_dtoh(&by_sequence).unwrap(),
        by_host.into_iter().map(u8::from).collect::<Vec<_>>()
    );

    // Whatever the objective's own ratio.
    let objective = objective.with_hard_ratio(0.9).unwrap();
    let student = DeviceLogits::new(&loaded.student, 11, 300).unwrap();
    let teacher = DeviceLogits::new(&loaded.teacher, 11, 300).unwrap();
    let batch = DeviceBatch::new(teacher, &loaded.labels).unwrap();
    let batch = batch.with_hard(hard.as_view()).unwrap();
    let to = DeviceLogitsMut::new(&mut loaded.gradient, 11, 300).unwrap();
    loaded.workspace.forward_backward(stream, &objective, &batch, &student, to, None).unwrap();
    assert_eq!(loaded.read(), (expected, gradient));
    let counted = loaded.workspace.groups();
    let hard_tokens = stream.clone_dtoh(&counted).unwrap();
    assert_eq!(hard_tokens.iter().filter(|&&group| group == 2).count(), 5);
}

/// Columns beyond the vocabulary, as many as each model has, count for nothing; those of the gradient become 0.
#[test]
fn padded_vocabularies() {
    const TOKENS: usize = 6;
    const COLUMNS: [usize; 2] = [152, 160];
    fn view(rows: &mut CudaSlice<bf16>) -> DeviceLogitsMut<'_> {
        DeviceLogitsMut::new(rows, TOKENS, COLUMNS[1]).unwrap().with_vocab(151).unwrap()
    }
    let Some(gpu) = Gpu::new() else { return };
    let (stream, objective) = (&gpu.stream, Objective::default());
    let input = Input::new(TOKENS, 151, 41);
    let mut loaded = Loaded::new(&gpu, stream, &input);
    let padded = |rows: &[bf16], columns: usize| -> Vec<bf16> {
        let padding = vec![bf16::from_f32(50.0); columns - 151];
        rows.chunks(151).flat_map(|row| row.iter().chain(&padding)).copied().collect()
    };
    let check = |output: Output, gradient: &[bf16]| {
        let rows = || gradient.chunks(COLUMNS[1]);
        let of_vocab = rows().flat_map(|row| &row[..151]).copied().collect();
        input.check(&objective, &(output, of_vocab));
        assert!(rows().all(|row| row[151..].iter().all(|g| g.to_bits() == 0)));
    };
    let teacher = gpu.upload(&padded(&input.teacher, COLUMNS[0]));
    let student_rows = padded(&input.student, COLUMNS[1]);
    let mut student = gpu.upload(&student_rows);
    let mut gradient = gpu.upload(&vec![bf16::NAN; student_rows.len()]);
    let workspace = &mut loaded.workspace;
    let teacher_view = || DeviceLogits::new(&teacher, TOKENS, COLUMNS[0]).unwrap();
    let batch =
        || DeviceBatch::new(teacher_view().with_vocab(151).unwrap(), &loaded.labels).unwrap();
    {
        let student = DeviceLogits::new(&student, TOKENS, COLUMNS[1]).unwrap();
        let (student, to) = (student.with_vocab(151).unwrap(), view(&mut gradient));
        workspace.forward_backward(stream, &objective, &batch(), &student, to, None).unwrap();
        check(workspace.read(stream).unwrap(), &stream.clone_dtoh(&gradient).unwrap());
    }
    {
        stream.memcpy_htod(&student_rows, &mut gradient).unwrap();
        let tokens = DeviceTokens::new(&loaded.labels, 151);
        let mut session = workspace.begin(stream, &objective, tokens, None).unwrap();
        let teacher = teacher_view().with_vocab(151).unwrap();
        session.rows_in_place(0, &teacher, view(&mut gradient)).unwrap();
        drop(session);
        let rows = stream.clone_dtoh(&gradient).unwrap();
        assert!(rows.chunks(COLUMNS[1]).all(|row| row[151..].iter().all(|g| g.to_bits() == 0)));
    }
    let in_place = view(&mut student);
    workspace.forward_backward_in_place(stream, &objective, &batch(), in_place, None).unwrap();
    check(workspace.read(stream).unwrap(), &stream.clone_dtoh(&student).unwrap());

    // By address, three rows to an outer index.
    let strides = Strides::nested(3, 4 * COLUMNS[1], COLUMNS[1]);
    let mut nested = gpu.upload(&vec![bf16::ONE; 7 * COLUMNS[1]]);
    let call = RawCall {
        gradient: Some(RawLogits {
            address: nested.device_ptr_mut(stream).0,
            dtype: Dtype::Bf16,
            strides,
        }),
        gradient_padding: 9,
        ..loaded.raw()
    };
    loaded.launch(&objective, &call).unwrap();
    let mut nested = stream.clone_dtoh(&nested).unwrap();
    let between: Vec<bf16> = nested.drain(3 * COLUMNS[1]..4 * COLUMNS[1]).collect();
    assert_eq!(between, [bf16::ONE; COLUMNS[1]]);
    check(loaded.workspace.read(stream).unwrap(), &nested);

    let error = teacher_view().with_vocab(153).map(drop);
    assert_eq!(error, Err(Error::Vocab { vocab: 153, columns: 152 }));
}

#[test]
fn entropies() {
    let Some(gpu) = Gpu::new() else { return };
    let stream = &gpu.stream;
    let input = Input::new(11, 3000, 7);
    let loaded = Loaded::new(&gpu, stream, &input);
    let logits = DeviceLogits::new(&loaded.teacher, 11, 3000).unwrap();
    let mut to: CudaSlice<f32> = stream.alloc_zeros(11).unwrap();
    loaded.workspace.token_entropies(stream, &logits, 2.0, to.as_view_mut()).unwrap();
    let host = stream.clone_dtoh(&loaded.teacher).unwrap();
    let host = Logits::new(&host, 11, 3000).unwrap();
    let found = stream.clone_dtoh(&to).unwrap();
    for (&found, exact) in found.iter().zip(reference::token_entropies(host, 2.0).unwrap()) {
        let off = (f64::from(found) - exact).abs();
        assert!(off <= 2e-6 * (1.0 + exact), "{found}, but exactly {exact}");
    }
    assert_eq!(gpu.kernels.token_entropies(host, 2.0).unwrap(), found);
    let none = Logits::new(&[0.0_f32; 0][..], 0, 7).unwrap();
    assert!(gpu.kernels.token_entropies(none, 2.0).unwrap().is_empty());
    let few = to.slice_mut(..10);
    let error = loaded.workspace.token_entropies(stream, &logits, 2.0, few).unwrap_err();
    assert_eq!(error, Error::MaskCount { what: "the entropies", values: 10, tokens: 11 });
    let cold = loaded.workspace.token_entropies(stream, &logits, 0.0, to.as_view_mut());
    assert!(matches!(cold, Err(Error::Setting { name: "the temperature", .. })));
}

/// Faults of a selection, or of margins, by itself are an error at once, or of the next read where a kernel met
/// them.
#[test]
fn selections_and_margins_that_cannot_be() {
    let Some(gpu) = Gpu::new() else { return };
    let (stream, objective) = (&gpu.stream, Objective::default());
    let mut input = Input::new(4, 30, 7);
    input.labels[2] = 30;
    let mut loaded = Loaded::new(&gpu, stream, &input);
    let mut floats: CudaSlice<f32> = stream.alloc_zeros(4).unwrap();
    let mut bytes: CudaSlice<u8> = stream.clone_htod(&[7_u8; 4]).unwrap();
    let batch = || {
        let teacher = DeviceLogits::new(&loaded.teacher, 4, 30).unwrap();
        DeviceBatch::new(teacher, &loaded.labels).unwrap()
    };
    let workspace = &mut loaded.workspace;
    let result = workspace.teacher_margins(stream, &objective, &batch(), floats.slice_mut(..3));
    assert_eq!(result, Err(Error::MarginCount { margins: 3, tokens: 4 }));
    workspace.teacher_margins(stream, &objective, &batch(), floats.as_view_mut()).unwrap();
    assert!(stream.clone_dtoh(&floats).unwrap()[2].is_nan());
    let fault = workspace.read_loss(stream).unwrap_err();
    assert_eq!(fault, Error::DeviceLabel { token: 2, vocab: 30, ignore_index: -100 });
    assert_eq!(workspace.read_loss(stream), Ok(0.0));

    let error = batch().with_hard(bytes.slice(..3)).unwrap_err();
    let what = "the mask of hard tokens";
    assert_eq!(error, Error::MaskCount { what, values: 3, tokens: 4 });
    let margins = floats.as_view();
    let result = workspace.select_hard(stream, &margins, None, 0.5, None, bytes.slice_mut(..3));
    assert_eq!(result, Err(Error::MaskCount { what, values: 3, tokens: 4 }));
    let result = workspace.select_hard(stream, &margins, None, -1.0, None, bytes.as_view_mut());
    assert!(matches!(result, Err(Error::Setting { name: "the hard ratio", .. })));
    let three = gpu.upload(&[1_u8; 3]);
    let valid = Some(three.as_view());
    let result =
        workspace.select_hard(stream, &margins, valid.as_ref(), 0.5, None, bytes.as_view_mut());
    assert_eq!(result, Err(Error::MaskCount { what: "valid", values: 3, tokens: 4 }));
    let offsets = gpu.upload(&[0_i64, 3, 2, 4]);
    let sequences = Some(offsets.as_view());
    let to = bytes.as_view_mut();
    workspace.select_hard(stream, &margins, None, 1.0, sequences.as_ref(), to).unwrap();
    let fault = workspace.read_loss(stream).unwrap_err();
    assert_eq!(fault, Error::DeviceSequences { sequence: 1 });
    assert_eq!(stream.clone_dtoh(&bytes).unwrap(), [1, 1, 1, 1]);
    let offsets = gpu.upload(&[0_i64, 3, 3, 5]);
    let sequences = Some(offsets.as_view());
    let to = bytes.as_view_mut();
    workspace.select_hard(stream, &margins, None, 1.0, sequences.as_ref(), to).unwrap();
    assert!(workspace.read_loss(stream).is_err());
    // None are of the sequence that ends beyond the tokens.
    assert_eq!(stream.clone_dtoh(&bytes).unwrap(), [1, 1, 1, 0]);
}

#[test]
fn labels_out_of_range_are_reported_once() {
    let Some(gpu) = Gpu::new() else { return };
    let mut input = Input::new(6, 40, 7);
    for (objective, read_loss) in [
        (Objective::default(), false),
        (Objective::kl(), true),
        (Objective::default().with_target(Target::Teacher), true),
    ] {
        (input.labels[3], input.labels[5]) = (40, i64::MIN);
        let mut loaded = Loaded::new(&gpu, &gpu.stream, &input);
        loaded.backward(&objective, None).unwrap();
        assert!(loaded.loss().is_nan());
        let fault = match read_loss {
            true => loaded.workspace.read_loss(&gpu.stream).unwrap_err(),
            false => loaded.workspace.read(&gpu.stream).unwrap_err(),
        };
        assert_eq!(fault, Error::DeviceLabel { token: 3, vocab: 40, ignore_index: -100 });
        // The same as if the tokens were ignored.
        (input.labels[3], input.labels[5]) = (-100, -100);
        input.check(&objective, &loaded.read());
        loaded.replace(&input);
        loaded.backward(&objective, None).unwrap();
        assert!(loaded.loss().is_finite());
        input.check(&objective, &loaded.read());
    }
    // From host memory the label is seen before the device is asked.
    input.labels[3] = 40;
    let result =
        gpu.kernels.forward(&Objective::default(), &input.batch(), input.view(&input.student));
    let expected = Error::LabelOutOfRange { token: 3, label: 40, vocab: 40, ignore_index: -100 };
    assert_eq!(result.unwrap_err(), expected);
}

/// A fault that nobody read is still there after later calls without one.
#[test]
fn faults_wait_for_the_next_read() {
    let Some(gpu) = Gpu::new() else { return };
    let good = Input::new(5, 60, 8);
    let mut bad = Input::new(5, 60, 8);
    bad.labels[4] = -7;
    let mut loaded = Loaded::new(&gpu, &gpu.stream, &bad);
    loaded.forward(&Objective::default()).unwrap();
    loaded.replace(&good);
    loaded.backward(&Objective::default(), None).unwrap();
    assert!(loaded.loss().is_nan());
    let fault = loaded.workspace.read_loss(&gpu.stream).unwrap_err();
    assert_eq!(fault, Error::DeviceLabel { token: 4, vocab: 60, ignore_index: -100 });
    good.check(&Objective::default(), &loaded.read());
}

#[test]
fn workspaces() {
    let Some(gpu) = Gpu::new() else { return };
    let objective = Objective::default();
    let large = Input::new(12, 30, 9);
    let small = Input::new(5, 70, 10);
    let mut loaded = Loaded::new(&gpu, &gpu.stream, &large);
    assert_eq!(loaded.workspace.capacity(), 12);
    assert_eq!(loaded.workspace.read_loss(&gpu.stream).unwrap(), 0.0);
    let nothing = Output { loss: 0.0, tokens: Vec::new() };
    assert_eq!(loaded.workspace.read(&gpu.stream).unwrap(), nothing);
    assert_eq!(loaded.workspace.uncertainty().len(), 0);
    loaded.backward(&objective, None).unwrap();
    large.check(&objective, &loaded.read());

    let mut other = Loaded::new(&gpu, &gpu.stream, &small);
    std::mem::swap(&mut loaded.workspace, &mut other.workspace);
    other.backward(&objective, None).unwrap();
    small.check(&objective, &other.read());
    let error = loaded.backward(&objective, None).unwrap_err();
    assert_eq!(error, Error::Workspace { what: "tokens", needed: 12, capacity: 5 });
    let error = Workspace::new(&gpu.kernels, &gpu.stream, 1 << 31).unwrap_err();
    assert!(matches!(error, Error::TooLarge { value: 2_147_483_648, .. }), "{error}");

    let offsets = gpu.upload(&[0_i64, 1, 2, 3, 4, 5, 5]);
    let call = RawCall { sequences: Some((offsets.device_ptr(&gpu.stream).0, 6)), ..other.raw() };
    std::mem::swap(&mut loaded.workspace, &mut other.workspace);
    // More sequences than there is room for tokens: one has none.
    other.launch(&objective, &call).unwrap();
    assert!(other.read().0.tokens.iter().all(|token| token.hard));
}

#[test]
fn errors_name_what_does_not_fit() {
    let Some(gpu) = Gpu::new() else { return };
    let input = Input::new(4, 10, 11);
    let objective = Objective::default();
    let mut loaded = Loaded::new(&gpu, &gpu.stream, &input);
    let stream = &gpu.stream;
    let teacher = || DeviceLogits::new(&loaded.teacher, 4, 10).unwrap();
    let labels = || DeviceLabels::from(&loaded.labels);
    let expected = Error::Length {
        what: "logits",
        expected: 44,
        tokens: 4,
        vocab: 11,
        strides: 11.into(),
        actual: 40,
    };
    assert_eq!(DeviceLogits::new(&loaded.teacher, 4, 11).unwrap_err(), expected);
    let short = DeviceLogits::new(loaded.teacher.slice(..30), 3, 10).unwrap();
    let error = DeviceBatch::new(short, labels()).unwrap_err();
    assert_eq!(error, Error::LabelCount { labels: 4, tokens: 3 });
    let batch = || DeviceBatch::new(teacher(), labels()).unwrap();
    let three = gpu.upload(&[0.0_f32; 3]);
    let error = batch().with_margins(three.as_view()).unwrap_err();
    assert_eq!(error, Error::MarginCount { margins: 3, tokens: 4 });
    let none = gpu.upload(&[0_i64]);
    let error = batch().with_sequences(none.slice(..0)).unwrap_err();
    assert!(matches!(error, Error::Sequences { tokens: 4, .. }), "{error}");

    let other_shape = DeviceLogits::new(&loaded.student, 5, 8).unwrap();
    let expected = |what| Error::ShapeMismatch { what, expected: [4, 10], actual: [5, 8] };
    let error = loaded.workspace.forward(stream, &objective, &batch(), &other_shape).unwrap_err();
    assert_eq!(error, expected("the student's logits"));
    let student = DeviceLogits::new(&loaded.student, 4, 10).unwrap();
    let to = DeviceLogitsMut::new(&mut loaded.gradient, 5, 8).unwrap();
    let workspace = &mut loaded.workspace;
    let error = workspace.forward_backward(stream, &objective, &batch(), &student, to, None);
    assert_eq!(error.unwrap_err(), expected("the gradient"));
    let mut halves = stream.alloc_zeros::<half::f16>(40).unwrap();
    let to = DeviceLogitsMut::new(&mut halves, 4, 10).unwrap();
    let error = workspace.forward_backward(stream, &objective, &batch(), &student, to, None);
    let expected = Error::GradientDtype { student: Dtype::Bf16, actual: Dtype::F16 };
    assert_eq!(error.unwrap_err(), expected);
    let unlabelled = DeviceBatch::unlabelled(teacher());
    let error = workspace.forward(stream, &objective, &unlabelled, &student).unwrap_err();
    assert_eq!(error, Error::NoLabels);

    let call = loaded.raw();
    let to = call.gradient.unwrap();
    let at = |address| RawLogits { address, ..to };
    let (student, end) = (call.student.address, call.student.address + 80);
    let overlapping = RawCall { gradient: Some(at(student + 2)), ..call };
    let error = loaded.launch(&objective, &overlapping).unwrap_err();
    let expected = Error::Overlap {
        what: "the student's logits",
        gradient: [student + 2, end + 2],
        other: [student, end],
    };
    assert_eq!(error, expected);
    let unaligned = RawCall { gradient: Some(at(to.address + 1)), ..call };
    let error = loaded.launch(&objective, &unaligned).unwrap_err();
    let (what, address) = ("the gradient", to.address + 1);
    assert_eq!(error, Error::Unaligned { what, address, multiple: 2 });
    for (tokens, vocab) in [(usize::MAX, 10), (4, usize::MAX), (1 << 31, 10)] {
        let error = loaded.launch(&objective, &RawCall { tokens, vocab, ..call }).unwrap_err();
        assert!(matches!(error, Error::TooLarge { most: 0x7fff_ffff, .. }), "{error}");
    }
    let teacher = RawLogits { strides: (1_usize << 62).into(), ..call.teacher };
    let error = loaded.launch(&objective, &RawCall { teacher, ..call }).unwrap_err();
    assert!(matches!(error, Error::Shape { what: "the teacher's logits", .. }), "{error}");
    // Nothing of this left a trace.
    loaded.backward(&objective, None).unwrap();
    input.check(&objective, &loaded.read());
    let error = cuda::context(1000).unwrap_err();
    assert!(matches!(error, Error::NoDevice { ordinal: 1000, .. }), "{error}");
}

#[test]
fn memory_and_streams_of_another_device() {
    let (Some(gpu), Some(other)) = (Gpu::new(), Gpu::or_skip(1)) else { return };
    let input = Input::new(4, 10, 12);
    let objective = Objective::default();
    // Streams beside the default one, so that cudarc tracks the use of memory.
    let (stream, foreign) =
        (gpu.context.new_stream().unwrap(), other.context.new_stream().unwrap());
    let mut loaded = Loaded::new(&gpu, &stream, &input);
    let mut elsewhere = Loaded::new(&other, &foreign, &input);
    let expected = |what| Err(Error::OtherContext { what, expected: 0, actual: 1 });
    for _ in 0..2 {
        std::mem::swap(&mut loaded.teacher, &mut elsewhere.teacher);
        assert_eq!(loaded.forward(&objective), expected("the teacher's logits"));
        std::mem::swap(&mut loaded.teacher, &mut elsewhere.teacher);
        std::mem::swap(&mut loaded.student, &mut elsewhere.student);
        assert_eq!(loaded.backward(&objective, None), expected("the student's logits"));
        assert_eq!(loaded.in_place(&objective), expected("the student's logits"));
        std::mem::swap(&mut loaded.student, &mut elsewhere.student);
        std::mem::swap(&mut loaded.gradient, &mut elsewhere.gradient);
        assert_eq!(loaded.backward(&objective, None), expected("the gradient"));
        std::mem::swap(&mut loaded.gradient, &mut elsewhere.gradient);
        std::mem::swap(&mut loaded.labels, &mut elsewhere.labels);
        assert_eq!(loaded.backward(&objective, None), expected("the labels"));
        std::mem::swap(&mut loaded.labels, &mut elsewhere.labels);
        let upstream = foreign.clone_htod(&[1.0_f32]).unwrap();
        let result = loaded.backward(&objective, Some(&upstream.as_view()));
        assert_eq!(result, expected("the upstream gradient"));
        loaded.stream = foreign.clone();
        assert_eq!(loaded.backward(&objective, None), expected("the stream"));
        loaded.stream = stream.clone();
        let result = Workspace::new(&gpu.kernels, &foreign, 4).map(drop);
        assert_eq!(result, expected("the stream"));
    }
    for (loaded, context) in [(&mut loaded, &gpu.context), (&mut elsewhere, &other.context)] {
        context.check_err().unwrap();
        loaded.backward(&objective, None).unwrap();
        input.check(&objective, &loaded.read());
    }
}

/// Rows that start anywhere, with memory between them that is not the kernels'.
#[test]
fn views_at_odd_elements_with_strides() {
    let Some(gpu) = Gpu::new() else { return };
    for vocab in VOCABS {
        for (offset, stride) in [(1, vocab), (3, vocab + 1), (7, vocab + 13)] {
            let input = Input::new(3, vocab, 13);
            let objective = Objective::default();
            let spread = |rows: &[bf16]| {
                let mut memory = vec![bf16::NAN; offset + 3 * stride];
                for (row, to) in rows.chunks(vocab).zip(memory[offset..].chunks_mut(stride)) {
                    to[..vocab].copy_from_slice(row);
                }
                gpu.upload(&memory)
            };
            let (teacher, student) = (spread(&input.teacher), spread(&input.student));
            let gap = bf16::from_f32(13.0);
            let mut gradient = gpu.upload(&vec![gap; offset + 3 * stride]);
            let labels = gpu.upload(&[&[-1], &input.labels[..]].concat());
            let end = offset + 2 * stride + vocab;
            let teacher = DeviceLogits::strided(teacher.slice(offset..end), 3, vocab, stride);
            let student = DeviceLogits::strided(student.slice(offset..), 3, vocab, stride).unwrap();
            let labels = DeviceLabels::I64(labels.slice(1..));
            let batch = DeviceBatch::new(teacher.unwrap(), labels).unwrap();
            let to: CudaViewMut<bf16> = gradient.slice_mut(offset..end);
            let to = DeviceLogitsMut::strided(to, 3, vocab, stride).unwrap();
            let mut workspace = Workspace::new(&gpu.kernels, &gpu.stream, 3).unwrap();
            workspace
                .forward_backward(&gpu.stream, &objective, &batch, &student, to, None)
                .unwrap();
            let output = workspace.read(&gpu.stream).unwrap();
            let memory = gpu.stream.clone_dtoh(&gradient).unwrap();
            let (before, rows) = memory.split_at(offset);
            assert!(before.iter().all(|&g| g == gap));
            let mut gradient = Vec::new();
            for row in rows.chunks(stride) {
                gradient.extend_from_slice(&row[..vocab]);
                assert!(row[vocab..].iter().all(|&g| g == gap));
            }
            input.check(&objective, &(output, gradient));
        }
    }
}

/// The rows of `[2, 4, 2, vocab + 1]` but for the last of every four: the student's, and beside each the gradient's.
#[test]
fn rows_of_two_strides_beside_each_other() {
    let Some(gpu) = Gpu::new() else { return };
    for vocab in VOCABS {
        let input = Input::new(6, vocab, 14);
        let objective = Objective::default();
        let (width, row, outer) = (vocab + 1, 2 * (vocab + 1), 8 * (vocab + 1));
        let strides = Strides::nested(3, outer, row);
        let start = |token: usize| token / 3 * outer + token % 3 * row;
        let mut before = vec![bf16::from_f32(13.0); 2 * outer];
        for (token, logits) in input.student.chunks(vocab).enumerate() {
            before[start(token)..][..vocab].copy_from_slice(logits);
        }
        let mut loaded = Loaded::new(&gpu, &gpu.stream, &input);
        let mut both = gpu.upload(&before);
        let address = both.device_ptr(&gpu.stream).0;
        let call = loaded.raw();
        let at = |element: usize| RawLogits {
            address: address + 2 * element as u64,
            strides,
            ..call.student
        };
        for (to, upstream) in [(width, None), (0, None), (width, Some(f32::INFINITY))] {
            gpu.stream.memcpy_htod(&before, &mut both).unwrap();
            let factor = upstream.map(|upstream| gpu.upload(&[upstream]));
            let upstream = factor.as_ref().map(|factor| factor.device_ptr(&gpu.stream).0);
            let call = RawCall { student: at(0), gradient: Some(at(to)), upstream, ..call };
            loaded.launch(&objective, &call).unwrap();
            let output = loaded.workspace.read(&gpu.stream).unwrap();
            let mut after = gpu.stream.clone_dtoh(&both).unwrap();
            let mut gradient = Vec::new();
            for token in 0..6 {
                let at = start(token) + to;
                gradient.extend_from_slice(&after[at..at + vocab]);
                after[at..at + vocab].copy_from_slice(&before[at..at + vocab]);
            }
            assert!(after == before, "something else was written");
            if upstream.is_none() {
                input.check(&objective, &(output, gradient));
                continue;
            }
            check_output(&output, &input.reference(&objective, &input.batch()).0);
            for (row, token) in gradient.chunks(vocab).zip(&output.tokens) {
                assert!(row.iter().all(|g| if token.valid {
                    g.is_nan()
                } else {
                    *g == bf16::ZERO
                }));
            }
        }
        let overlapping = RawCall { student: at(0), gradient: Some(at(vocab - 1)), ..call };
        let error = loaded.launch(&objective, &overlapping).unwrap_err();
        assert!(matches!(error, Error::Overlap { what: "the student's logits", .. }), "{error}");
    }
}

#[test]
fn batches_without_tokens() {
    let Some(gpu) = Gpu::new() else { return };
    let some = Input::new(2, 30, 14);
    let mut loaded = Loaded::new(&gpu, &gpu.stream, &some);
    for objective in [
        Objective::default(),
        Objective::kl().with_reduction(Reduction::Sum).unwrap(),
        Objective::default().with_target(Target::Teacher),
    ] {
        loaded.backward(&objective, None).unwrap();
        let teacher = DeviceLogits::new(loaded.teacher.slice(..0), 0, 30).unwrap();
        let labels = DeviceLabels::I64(loaded.labels.slice(..0));
        let batch = DeviceBatch::new(teacher, labels).unwrap();
        let student = DeviceLogits::new(loaded.student.slice(..0), 0, 30).unwrap();
        let to = DeviceLogitsMut::new(loaded.gradient.slice_mut(..0), 0, 30).unwrap();
        let workspace = &mut loaded.workspace;
        workspace.forward_backward(&gpu.stream, &objective, &batch, &student, to, None).unwrap();
        let nothing = Output { loss: 0.0, tokens: Vec::new() };
        assert_eq!(workspace.read(&gpu.stream).unwrap(), nothing);

        let empty = Input::new(0, 30, 0);
        let to = LogitsMut::new(&mut [0.0_f32; 0][..], 0, 30).unwrap();
        let student = empty.view(&empty.student);
        let by_host = gpu.kernels.forward_backward(&objective, &empty.batch(), student, to);
        assert_eq!(by_host.unwrap(), nothing);
    }
}

#[test]
fn by_address() {
    let Some(gpu) = Gpu::new() else { return };
    let input = Input::new(5, 90, 15);
    let mut loaded = Loaded::new(&gpu, &gpu.stream, &input);
    let call = loaded.raw();
    loaded.launch(&Objective::default(), &call).unwrap();
    input.check(&Objective::default(), &loaded.read());
    let call = RawCall { gradient: None, ..call };
    loaded.launch(&Objective::kl(), &call).unwrap();
    let (exact, _) = input.reference(&Objective::kl(), &input.batch());
    check_output(&loaded.read().0, &exact);
}

/// Work on one stream, inputs from another, results read on a third: cudarc's events keep the order.
#[test]
fn streams_wait_for_each_other() {
    let Some(gpu) = Gpu::new() else { return };
    let objective = Objective::default();
    let [copies, calls, reads] = [(); 3].map(|()| gpu.context.new_stream().unwrap());
    let (first, second) = (Input::new(4, 80, 16), Input::new(4, 80, 17));
    let mut loaded = Loaded::new(&gpu, &copies, &first);
    for input in [&first, &second, &first] {
        loaded.stream = copies.clone();
        loaded.replace(input);
        loaded.stream = calls.clone();
        loaded.backward(&objective, None).unwrap();
        loaded.stream = reads.clone();
        input.check(&objective, &loaded.read());
        loaded.stream = copies.clone();
        loaded.forward(&objective).unwrap();
        let loss: Vec<f32> = calls.clone_dtoh(&loaded.workspace.loss()).unwrap();
        let (exact, _) = input.reference(&objective, &input.batch());
        assert!((f64::from(loss[0]) - exact.loss).abs() <= 1e-6 * exact.loss + 2e-7);
    }
    gpu.context.check_err().unwrap();
}

fn begin(stream: &CudaStream) {
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
}

fn end(stream: &Arc<CudaStream>) -> CudaGraph {
    stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().expect("something was captured")
}

/// A graph replays the call on what its memory then holds.
#[test]
fn a_captured_call() {
    [0, 3].into_iter().filter_map(Gpu::or_skip).for_each(captured_call);
}

fn captured_call(gpu: Gpu) {
    // SAFETY: one stream alone.
    unsafe { gpu.context.disable_event_tracking() };
    let stream = gpu.context.new_stream().unwrap();
    let objective = Objective::default();
    let inputs = [18, 19, 20].map(|seed| Input::new(7, 20_011, seed));
    let mut loaded = Loaded::new(&gpu, &stream, &inputs[0]);
    begin(&stream);
    loaded.backward(&objective, None).unwrap();
    let graph = end(&stream);
    assert!(stream.clone_dtoh(&loaded.gradient).unwrap().iter().all(|g| g.is_nan()));
    for input in &inputs {
        loaded.replace(input);
        graph.launch().unwrap();
        input.check(&objective, &loaded.read());
    }
    drop(graph);
    gpu.context.check_err().unwrap();
    loaded.replace(&inputs[0]);
    loaded.backward(&objective, None).unwrap();
    inputs[0].check(&objective, &loaded.read());
}

/// cudarc's events do not go into a graph; the call says so and leaves the capture as it was. By address
/// it can be captured all the same.
#[test]
fn a_capture_while_memory_is_tracked() {
    let Some(gpu) = Gpu::new() else { return };
    // The kernels' own context, and another owner of the same one.
    for context in [cuda::context(0).unwrap(), gpu.context.clone()] {
        let stream = context.new_stream().unwrap();
        let objective = Objective::default();
        let input = Input::new(4, 100, 21);
        let mut loaded = Loaded::new(&gpu, &stream, &input);
        loaded.backward(&objective, None).unwrap();
        let expected = loaded.read();
        let call = loaded.raw();
        begin(&stream);
        assert_eq!(loaded.forward(&objective), Err(Error::TrackedCapture));
        assert_eq!(loaded.backward(&objective, None), Err(Error::TrackedCapture));
        assert_eq!(loaded.in_place(&objective), Err(Error::TrackedCapture));
        loaded.launch(&objective, &call).unwrap();
        let graph = end(&stream);
        context.check_err().unwrap();
        stream.memset_zeros(&mut loaded.gradient).unwrap();
        graph.launch().unwrap();
        assert_eq!(loaded.read(), expected);
        drop(graph);
        loaded.backward(&objective, None).unwrap();
        input.check(&objective, &loaded.read());
        loaded.stream = context.new_stream().unwrap();
        loaded.in_place(&objective).unwrap();
        let output = loaded.workspace.read(&stream).unwrap();
        assert_eq!(with_margins_of(&expected.0, output), expected.0);
        drop(loaded);
        context.check_err().unwrap();
        context.synchronize().unwrap();
    }
}

#[test]
fn the_unfused_baseline_computes_the_same() {
    let Some(gpu) = Gpu::new() else { return };
    let input = Input::new(9, 50, 22);
    let mut loaded = Loaded::new(&gpu, &gpu.stream, &input);
    let mut unfused = Unfused::new(&gpu.kernels, &gpu.stream, 9, 50).unwrap();
    for _ in 0..2 {
        // SAFETY: the addresses are of the input's memory, used on one stream.
        let kernels = unsafe { unfused.launch(&gpu.stream, &loaded.raw()) }.unwrap();
        assert!(kernels > 30);
        let objective = Objective::default();
        let exact = input.reference(&objective, &input.batch());
        let gradient = gpu.stream.clone_dtoh(&loaded.gradient).unwrap();
        check_gradient(&objective, &gradient, &exact, 50);
        gpu.stream.memset_zeros(&mut loaded.gradient).unwrap();
    }
    let larger = Loaded::new(&gpu, &gpu.stream, &Input::new(10, 50, 23));
    // SAFETY: as above.
    let error = unsafe { unfused.launch(&gpu.stream, &larger.raw()) }.unwrap_err();
    assert!(matches!(error, Error::Workspace { .. }), "{error}");
}

#[test]
fn columns_on_the_device_are_what_read_returns() {
    let Some(gpu) = Gpu::new() else { return };
    let mut input = Input::new(5, 44, 24);
    input.labels[0] = -100;
    let mut loaded = Loaded::new(&gpu, &gpu.stream, &input);
    loaded.backward(&Objective::default(), None).unwrap();
    let (output, _) = loaded.read();
    let workspace = &loaded.workspace;
    let float = |view: CudaView<f32>| -> Vec<f64> {
        gpu.stream.clone_dtoh(&view).unwrap().into_iter().map(f64::from).collect()
    };
    let column =
        |of: fn(&atkd::TokenTerms) -> f64| -> Vec<f64> { output.tokens.iter().map(of).collect() };
    assert_eq!(float(workspace.loss()), [f64::from(output.loss as f32)]);
    assert_eq!(float(workspace.uncertainty()), column(|token| token.uncertainty));
    assert_eq!(float(workspace.tkd()), column(|token| token.tkd));
    assert_eq!(float(workspace.dkd()), column(|token| token.dkd));
    let losses = gpu.stream.clone_dtoh(&workspace.token_losses()).unwrap();
    assert_eq!(losses, column(|token| token.loss));
    let groups = gpu.stream.clone_dtoh(&workspace.groups()).unwrap();
    let expected: Vec<u8> =
        output.tokens.iter().map(|token| u8::from(token.valid) + u8::from(token.hard)).collect();
    assert_eq!(groups, expected);
    assert_eq!(groups[0], 0);
}

#[test]
fn times_of_the_kernels() {
    let Some(gpu) = Gpu::new() else { return };
    let mut loaded = Loaded::new(&gpu, &gpu.stream, &Input::new(3, 44, 25));
    loaded.backward(&Objective::default(), None).unwrap();
    assert_eq!(loaded.workspace.times().unwrap(), []);
    loaded.workspace.take_times();
    for _ in 0..2 {
        loaded.backward(&Objective::default(), None).unwrap();
        let times = loaded.workspace.times().unwrap();
        let kernels: Vec<_> = times.iter().map(|(kernel, _)| *kernel).collect();
        let rows = kernels[1];
        assert!(rows.starts_with("row_"), "{rows}");
        assert_eq!(kernels, ["count_valid", rows, "select_hard", rows, "token_terms"]);
        assert!(times.iter().all(|&(_, milliseconds)| milliseconds >= 0.0));
    }
}
