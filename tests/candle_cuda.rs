//! The candle operation on CUDA tensors, against the one on CPU tensors. Where there is no device, every test says on
//! standard error that it was skipped. `scripts/candle-cuda` runs them on the simulated driver, which also tells what
//! was read and allocated; it knows few of candle's own kernels, so that tensors here come from the CPU.

use std::ffi::{CString, c_char};
use std::io::Write;

use atkd::candle::{
    KnownLogProbs, Layer, Tokens, linear_loss, linear_loss_with_output, loss, loss_with_output,
    sparse_loss, sparse_loss_with_output, token_entropies,
};
use atkd::cuda::{self, Kernels};
use atkd::head::Chunks;
use atkd::{Error, Objective, Reduction, Tail};
use candle_core::{DType, Device, Result, Tensor, Var};
use libloading::os::unix::Library;

const CPU: &Device = &Device::Cpu;

/// The first device; `None`, and loud, where there is nothing to test on.
fn device() -> Option<Device> {
    match cuda::context(0).and_then(|context| Kernels::load(&context)) {
        Ok(_) => Some(Device::new_cuda(0).unwrap()),
        Err(error @ (Error::NoDriver | Error::NoDevice { .. } | Error::NoKernels { .. })) => {
            skipped(&error.to_string());
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn skipped(why: &str) {
    let test = std::thread::current();
    let line = format!("SKIPPED: {}: {why}\n", test.name().unwrap_or("a test"));
    // At once, and not by a macro whose output the test runner swallows.
    let _ = std::io::stderr().write_all(line.as_bytes());
}

/// Returns true if the driver is the simulated one, which counts.
fn counts() -> bool {
    // SAFETY: looks for a name.
    let counts = unsafe { Library::this().get::<*const u8>(b"simt_driver_traffic").is_ok() };
    if !counts {
        skipped("only the simulated driver counts");
    }
    counts
}

/// Bytes that kernels read from, and wrote to, allocations of so many bytes.
fn traffic(bytes: usize) -> [u64; 2] {
    let (mut read, mut written) = (0, 0);
    // SAFETY: the simulated driver has this function, and there is room for two numbers.
    unsafe {
        let driver = Library::this();
        let traffic = driver
            .get::<unsafe extern "C" fn(usize, *mut u64, *mut u64)>(b"simt_driver_traffic")
            .unwrap();
        traffic(bytes, &mut read, &mut written);
    }
    [read, written]
}

/// How much memory this thread has allocated, in pieces.
fn allocations() -> u64 {
    let name = CString::new("cuMemAlloc").unwrap();
    // SAFETY: the simulated driver has this function.
    unsafe {
        let driver = Library::this();
        let count =
            driver.get::<unsafe extern "C" fn(*const c_char) -> u64>(b"simt_driver_count").unwrap();
        count(name.as_ptr())
    }
}

/// Both models' logits, and labels, on the CPU.
struct Input {
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
}

impl Input {
    fn new(shape: &[usize], [student, teacher]: [DType; 2], seed: u64) -> Self {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut logits = |dtype| {
            let values: Vec<f32> =
                (0..shape.iter().product()).map(|_| 12.0 * random.f32() - 6.0).collect();
            Tensor::from_vec(values, shape, CPU).unwrap().to_dtype(dtype).unwrap()
        };
        let (student, teacher) = (logits(student), logits(teacher));
        let (&vocab, leading) = shape.split_last().unwrap();
        let labels: Vec<i64> =
            (0..leading.iter().product()).map(|_| random.i64(0..vocab as i64)).collect();
        let labels = Tensor::from_vec(labels, leading, CPU).unwrap();
        Self { student, teacher, labels }
    }

    /// The same tokens several times.
    fn repeated(&self, times: usize) -> Self {
        let repeat = |tensor: &Tensor| Tensor::cat(&vec![tensor; times], 0).unwrap();
        Self {
            student: repeat(&self.student),
            teacher: repeat(&self.teacher),
            labels: repeat(&self.labels),
        }
    }

    fn to(&self, device: &Device) -> Self {
        let to = |tensor: &Tensor| tensor.to_device(device).unwrap();
        Self { student: to(&self.student), teacher: to(&self.teacher), labels: to(&self.labels) }
    }

    /// The loss of the student as a variable.
    fn loss(&self, objective: &Objective) -> (Var, Tensor) {
        let student = Var::from_tensor(&self.student).unwrap();
        let loss = loss(objective, &student, &self.teacher, &self.labels).unwrap();
        (student, loss)
    }

    /// Loss and gradient.
    fn step(&self, objective: &Objective) -> (f32, Tensor) {
        let (student, loss) = self.loss(objective);
        let gradient = loss.backward().unwrap().remove(&student).unwrap();
        (loss.to_scalar().unwrap(), gradient)
    }
}

fn values(tensor: &Tensor) -> Vec<f32> {
    let tensor = tensor.to_device(CPU).unwrap().to_dtype(DType::F32).unwrap();
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// Asserts that a loss and a gradient are others to within rounding.
#[track_caller]
fn assert_near((loss, gradient): &(f32, Tensor), (expected_loss, expected): &(f32, Tensor)) {
    assert!((loss - expected_loss).abs() <= 2e-6 * expected_loss.abs() + 4e-7);
    assert_eq!((gradient.dtype(), gradient.dims()), (expected.dtype(), expected.dims()));
    let ulp = match expected.dtype() {
        DType::BF16 => 2f32.powi(-7),
        DType::F16 => 2f32.powi(-10),
        _ => 0.0,
    };
    let expected = values(expected);
    let scale = expected.iter().fold(0f32, |max, g| max.max(g.abs()));
    for (found, expected) in values(gradient).into_iter().zip(expected) {
        let bound = 4e-6 * scale + ulp * expected.abs() + if ulp > 0.0 { 6e-8 } else { 0.0 };
        assert!((found - expected).abs() <= bound, "{found} {expected} {scale}");
    }
}

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

#[test]
fn weights_temperatures_and_entropies_of_tokens() -> Result<()> {
    let Some(device) = device() else { return Ok(()) };
    let mut random = fastrand::Rng::with_seed(12);
    let mut values = |low: f32, high: f32| {
        let values: Vec<f32> = (0..6).map(|_| low + (high - low) * random.f32()).collect();
        Tensor::from_vec(values, (2, 3), CPU)
    };
    let (weights, temperatures) = (values(-0.5, 2.0)?, values(0.5, 4.0)?);
    let objective = Objective::default().with_ce_weight(0.4).unwrap();
    for dtype in DTYPES {
        let input = Input::new(&[2, 3, 300], [dtype; 2], 13);
        let step = |device: &Device| -> Result<(f32, Tensor)> {
            let input = input.to(device);
            let (weights, temperatures) =
                (weights.to_device(device)?, temperatures.to_device(device)?);
            let tokens = Tokens::from(&input.labels);
            let tokens = tokens.with_weights(&weights).with_temperatures(&temperatures);
            let student = Var::from_tensor(&input.student)?;
            let loss = loss(&objective, &student, &input.teacher, tokens)?;
            let gradient = loss.backward()?.remove(&student).unwrap();
            Ok((loss.to_scalar()?, gradient))
        };
        assert_near(&step(&device)?, &step(CPU)?);
        let entropies = token_entropies(&input.student.to_device(&device)?, 1.5)?;
        let expected = token_entropies(&input.student, 1.5)?;
        assert_eq!((entropies.dtype(), entropies.dims()), (DType::F32, expected.dims()));
        for (found, expected) in self::values(&entropies).into_iter().zip(self::values(&expected)) {
            assert!((found - expected).abs() <= 1e-5 * (1.0 + expected), "{found} {expected}");
        }
    }
    Ok(())
}

/// Hidden states and weights, with a bias and values of tokens; what is not tracked has no gradient. The factor that arrives
/// at `backward` is 1, as other kernels of candle's are not simulated.
#[test]
fn layers_agree_with_those_on_the_cpu() -> Result<()> {
    let Some(device) = device() else { return Ok(()) };
    const V: usize = 41;
    let random = |shape: &[usize], seed: u64| -> Result<Tensor> {
        let mut random = fastrand::Rng::with_seed(seed);
        let values = (0..shape.iter().product()).map(|_| 2.0 * random.f32() - 0.7).collect();
        Tensor::from_vec::<_, f32>(values, shape, CPU)
    };
    let labels: Vec<i64> = (0..15).map(|i| if i % 4 == 1 { -100 } else { i * 7 % 41 }).collect();
    let labels = Tensor::from_vec(labels, (3, 5), CPU)?;
    let (weights, temperatures) = (random(&[3, 5], 1)?, random(&[3, 5], 2)?.affine(1.0, 1.0)?);
    let group_mean = Objective::default().with_reduction(Reduction::GroupMean).unwrap();
    for (dtype, rounding) in [(DType::F32, 2e-5), (DType::BF16, 1e-2)] {
        let student = [random(&[3, 5, 8], 3)?, random(&[V, 8], 4)?, random(&[V], 5)?];
        let teacher = [random(&[3, 5, 6], 6)?, random(&[V, 6], 7)?];
        // Gradients of a dtype of their own are converted by a kernel of candle's.
        let all = if dtype == DType::F32 { 7 } else { 1 };
        for (objective, tracked) in [(Objective::default(), all), (group_mean, 1), (group_mean, 0)]
        {
            let run = |device: &Device| -> Result<_> {
                let to = |tensor: &Tensor| tensor.to_dtype(dtype)?.to_device(device);
                let [hidden, weight, bias] = student.each_ref().map(to);
                let vars = [
                    Var::from_tensor(&hidden?)?,
                    Var::from_tensor(&weight?)?,
                    Var::from_tensor(&bias?)?,
                ];
                let of: Vec<Tensor> = vars
                    .iter()
                    .enumerate()
                    .map(|(i, var)| {
                        if tracked >> i & 1 == 1 {
                            var.as_tensor().clone()
                        } else {
                            var.as_detached_tensor()
                        }
                    })
                    .collect();
                let [of_teacher, teacher_weight] = teacher.each_ref().map(to);
                let (of_teacher, teacher_weight) = (of_teacher?, teacher_weight?);
                let [labels, weights, temperatures] =
                    [&labels, &weights, &temperatures].map(|tensor| tensor.to_device(device));
                let (labels, weights, temperatures) = (labels?, weights?, temperatures?);
                let tokens =
                    Tokens::from(&labels).with_weights(&weights).with_temperatures(&temperatures);
                let layer = Layer::new(&of[0], &of[1]).with_bias(&of[2]);
                let teacher = Layer::new(&of_teacher, &teacher_weight);
                let (loss, output) =
                    linear_loss_with_output(&objective, layer, teacher, tokens, Chunks::Tokens(4))?;
                let alone = linear_loss(&objective, layer, teacher, tokens, Chunks::Tokens(4))?;
                assert_eq!(loss.track_op(), tracked != 0);
                let gradients = if tracked == 0 { None } else { Some(alone.backward()?) };
                let gradients: Vec<Option<Tensor>> =
                    vars.iter().map(|var| gradients.as_ref()?.get(var).cloned()).collect();
                Ok((loss.to_scalar::<f32>()?, alone.to_scalar::<f32>()?, output, gradients))
            };
            let (found, expected) = (run(&device)?, run(CPU)?);
            let near = |x: f32, y: f32| (x - y).abs() <= 1e-5 * y.abs();
            assert!(near(found.0, expected.0) && near(found.1, expected.0));
            for (found, expected) in found.2.tokens.iter().zip(&expected.2.tokens) {
                assert_eq!((found.hard, found.valid), (expected.hard, expected.valid));
            }
            for (i, (found, expected)) in found.3.iter().zip(&expected.3).enumerate() {
                assert_eq!(found.is_some(), tracked >> i & 1 == 1);
                let (Some(found), Some(expected)) = (found, expected) else { continue };
                assert_eq!((found.dtype(), found.dims()), (dtype, expected.dims()));
                let expected = values(expected);
                let largest = expected.iter().fold(0f32, |most, g| most.max(g.abs()));
                for (found, expected) in values(found).into_iter().zip(expected) {
                    let error = (found - expected).abs();
                    assert!(error <= rounding * largest, "{i}: {found}, but {expected}: {largest}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn agrees_with_the_cpu_for_every_dtype() {
    let Some(device) = device() else { return };
    for student in DTYPES {
        for teacher in DTYPES {
            for objective in [
                Objective::default(),
                Objective::kl().with_ce_weight(0.7).unwrap().with_temperature(2.0).unwrap(),
            ] {
                let input = Input::new(&[2, 5, 41], [student, teacher], 1);
                assert_near(&input.to(&device).step(&objective), &input.step(&objective));
            }
        }
    }
}

#[test]
fn a_scaled_loss_rescues_float16_gradients() {
    let Some(device) = device() else { return };
    let input = Input::new(&[5, 16], [DType::F16; 2], 4);
    let objective =
        |denominator| Objective::kl().with_reduction(Reduction::Denominator(denominator)).unwrap();
    let (student, mut loss) = input.to(&device).loss(&objective(1e7));
    for _ in 0..10 {
        loss = (&loss + &loss).unwrap();
    }
    let gradient = loss.backward().unwrap().remove(&student).unwrap();
    let expected = input.step(&objective(1e7 / 1024.0));
    assert_near(&(loss.to_scalar().unwrap(), gradient), &expected);
}

/// Rows that are not all of the memory's; the terms of each token.
#[test]
fn views_and_terms() -> Result<()> {
    let Some(device) = device() else { return Ok(()) };
    let input = Input::new(&[6, 24], [DType::F32, DType::BF16], 5);
    let on_device = input.to(&device);
    let view = |tensor: &Tensor| tensor.narrow(0, 1, 5)?.narrow(1, 0, 20);
    let labels = Tensor::new(&[3i64, 0, -100, 19, 7], CPU)?;
    let objective = Objective::default();
    let (expected, terms) =
        loss_with_output(&objective, &view(&input.student)?, &view(&input.teacher)?, &labels)?;
    let (student, teacher) = (view(&on_device.student)?, view(&on_device.teacher)?);
    let labels = labels.to_device(&device)?;
    let (found, found_terms) = loss_with_output(&objective, &student, &teacher, &labels)?;
    let (found, expected) = (found.to_scalar::<f32>()?, expected.to_scalar::<f32>()?);
    assert!((found - expected).abs() <= 2e-6 * expected.abs(), "{found} {expected}");
    assert_eq!(found_terms.tokens.len(), 5);
    for (found, expected) in found_terms.tokens.iter().zip(&terms.tokens) {
        assert_eq!((found.hard, found.valid), (expected.hard, expected.valid));
        assert!((found.loss - expected.loss).abs() <= 4e-6 * (1.0 + expected.loss));
    }
    Ok(())
}

/// The gradient that the forward pass left is given away once; what arrives multiplies either.
#[test]
fn backward_more_than_once() -> Result<()> {
    let Some(device) = device() else { return Ok(()) };
    for dtype in DTYPES {
        let input = Input::new(&[7, 50], [dtype; 2], 6).to(&device);
        let objective = Objective::default();
        let (_, once) = input.step(&objective);
        let once = values(&once);
        let (student, loss) = input.loss(&objective);
        let gradient = |loss: &Tensor| -> Result<Vec<f32>> {
            Ok(values(&loss.backward()?.remove(&student).unwrap()))
        };
        let twice = (&loss + &loss)?;
        for _ in 0..2 {
            let expected: Vec<f32> = once.iter().map(|g| 2.0 * g).collect();
            // Subnormal numbers lose digits by a factor of two.
            let near = |(found, expected): (&f32, &f32)| (found - expected).abs() <= 2e-7;
            assert!(gradient(&twice)?.iter().zip(&expected).all(near), "{dtype:?}");
            assert_eq!(gradient(&loss)?, once, "{dtype:?}");
        }
    }
    Ok(())
}

/// Three volumes a step but for float16, whose gradient waits for what arrives; the guess of which tokens are hard
/// survives from step to step, into larger batches, too.
#[test]
fn a_step_reads_each_model_once() {
    let Some(device) = device() else { return };
    if !counts() {
        return;
    }
    // No other test has allocations of these sizes.
    for (dtype, vocab, [reads, writes]) in
        [(DType::F32, 1501, [2, 1]), (DType::BF16, 1503, [2, 1]), (DType::F16, 1505, [4, 1])]
    {
        let small = Input::new(&[8, vocab], [dtype; 2], 7);
        let row = vocab * dtype.size_in_bytes();
        let step = |input: &Input| {
            let volume = input.labels.elem_count() * row;
            let input = input.to(&device);
            let before = traffic(volume);
            input.step(&Objective::default());
            device.synchronize().unwrap();
            let after = traffic(volume);
            let found: [u64; 2] = std::array::from_fn(|i| {
                let (moved, least) = (after[i] - before[i], [reads, writes][i] * volume as u64);
                moved.checked_sub(least).unwrap_or_else(|| panic!("{moved} of {least}"))
            });
            found
        };
        // A row's target is moved once more by each block that has a part of the row. The token at the threshold itself,
        // three times in the larger batch, may have been guessed wrong.
        let allowed = 3 * 2 * row as u64 + 24 * 8 * 4;
        // In a thread that has no guess yet: to the first call all tokens are hard. In float16 that is the loss alone, which
        // does nothing twice.
        std::thread::scope(|scope| {
            scope.spawn(|| {
                assert_eq!(step(&small)[0] > allowed, dtype != DType::F16, "{dtype:?}");
                for input in [&small, &small.repeated(3), &small] {
                    let beyond = step(input);
                    assert!(beyond.iter().all(|bytes| *bytes <= allowed), "{dtype:?}: {beyond:?}");
                }
            });
        });
    }
}

#[test]
fn the_loss_alone_reads_each_model_once_and_allocates_itself() {
    let Some(device) = device() else { return };
    if !counts() {
        return;
    }
    let input = Input::new(&[8, 1507], [DType::F32; 2], 8).to(&device);
    let bytes = 8 * 1507 * 4;
    for step in 0..3 {
        let (before, allocated) = (traffic(bytes), allocations());
        let loss =
            loss(&Objective::default(), &input.student, &input.teacher, &input.labels).unwrap();
        if step > 0 {
            assert_eq!(allocations() - allocated, 1);
        }
        loss.to_scalar::<f32>().unwrap();
        let after = traffic(bytes);
        let read = after[0] - before[0];
        let volumes = 2 * bytes as u64;
        assert!((volumes..volumes + 8 * 4 * 8).contains(&read), "{read} of {volumes}");
        assert_eq!(after[1], before[1]);
    }
    // A step allocates the gradient and the loss, and the same each time.
    let mut steps = [0; 4];
    for allocated in &mut steps {
        let loss = {
            let before = allocations();
            let student = Var::from_tensor(&input.student).unwrap();
            let copied = allocations();
            let found = loss(&Objective::default(), &student, &input.teacher, &input.labels);
            *allocated = allocations() - copied;
            assert!(copied > before);
            found.unwrap()
        };
        loss.to_scalar::<f32>().unwrap();
    }
    assert_eq!(steps[1..], [2; 3]);
}

/// Threads that share a device, each with its own default stream or both with one of their making.
#[test]
fn threads_that_share_a_device() {
    let Some(device) = device() else { return };
    let objective = Objective::default();
    for device in [device, Device::new_cuda_with_stream(0).unwrap()] {
        std::thread::scope(|scope| {
            for seed in 0..3 {
                let device = &device;
                scope.spawn(move || {
                    for tokens in [3, 9, 5] {
                        let input =
                            Input::new(&[tokens, 300], [DType::F32; 2], 100 * seed + tokens as u64);
                        assert_near(&input.to(device).step(&objective), &input.step(&objective));
                    }
                });
            }
        });
    }
}

/// A step's label that is out of range is that step's alone.
#[test]
fn labels_out_of_range() -> Result<()> {
    let Some(device) = device() else { return Ok(()) };
    let input = Input::new(&[4, 16], [DType::F32; 2], 9).to(&device);
    let objective = Objective::default();
    let bad = Tensor::new(&[0i64, 1, 16, 3], &device)?;
    let value = |labels: &Tensor| {
        loss(&objective, &input.student, &input.teacher, labels)?.to_scalar::<f32>()
    };
    let expected = value(&input.labels)?;
    assert!(value(&bad)?.is_nan());
    assert_eq!(value(&input.labels)?, expected);
    let error = loss_with_output(&objective, &input.student, &input.teacher, &bad).unwrap_err();
    assert!(error.to_string().contains("label of token 2 is out of range"), "{error}");
    assert_eq!(value(&input.labels)?, expected);
    Ok(())
}

/// The four likeliest tokens of a teacher, in the order of their indices, and each label's log-probability.
struct Known {
    indices: Tensor,
    log_probs: Tensor,
    of_targets: Tensor,
}

impl Known {
    fn new(input: &Input, dtype: DType) -> Self {
        let teacher = input.teacher.to_dtype(DType::F32).unwrap();
        let (tokens, vocab) = teacher.flatten(0, 1).unwrap().dims2().unwrap();
        let logits = values(&teacher);
        let labels: Vec<i64> = input.labels.flatten_all().unwrap().to_vec1().unwrap();
        let (mut indices, mut log_probs, mut of_targets) = (Vec::new(), Vec::new(), Vec::new());
        for (row, label) in logits.chunks(vocab).zip(labels) {
            let sum = row.iter().map(|&z| f64::from(z).exp()).sum::<f64>().ln();
            let log_prob = |j: usize| (f64::from(row[j]) - sum) as f32;
            let mut order: Vec<usize> = (0..vocab).collect();
            order.sort_by(|&i, &j| row[j].total_cmp(&row[i]));
            let known = &mut order[..4];
            known.sort_unstable();
            indices.extend(known.iter().map(|&j| j as i64));
            log_probs.extend(known.iter().map(|&j| log_prob(j)));
            of_targets.push(log_prob(label.max(0) as usize));
        }
        let leading = &input.student.dims()[..2];
        assert_eq!(of_targets.len(), tokens);
        let shape = [leading[0], leading[1], 4];
        Self {
            indices: Tensor::from_vec(indices, &shape[..], CPU).unwrap(),
            log_probs: Tensor::from_vec(log_probs, &shape[..], CPU)
                .and_then(|tensor| tensor.to_dtype(dtype))
                .unwrap(),
            of_targets: Tensor::from_vec(of_targets, leading, CPU).unwrap(),
        }
    }

    fn to(&self, device: &Device) -> Self {
        let to = |tensor: &Tensor| tensor.to_device(device).unwrap();
        Self {
            indices: to(&self.indices),
            log_probs: to(&self.log_probs),
            of_targets: to(&self.of_targets),
        }
    }

    fn teacher(&self, tail: Tail) -> KnownLogProbs<'_> {
        KnownLogProbs::new(&self.indices, &self.log_probs)
            .with_target_log_probs(&self.of_targets)
            .with_tail(tail)
    }
}

/// Loss, gradient and terms, for every dtype and the tails that kernels have; another `backward` computes the gradient anew.
#[test]
fn sparse_teachers_agree_with_those_on_the_cpu() -> Result<()> {
    let Some(device) = device() else { return Ok(()) };
    let objective = Objective::default();
    for dtype in DTYPES {
        let input = Input::new(&[2, 5, 41], [dtype, DType::F32], 14);
        for (log_dtype, tail) in
            [(DType::F32, Tail::Bucket), (DType::BF16, Tail::Zero), (DType::F32, Tail::Sampled)]
        {
            let known = Known::new(&input, log_dtype);
            let step = |device: &Device| -> Result<_> {
                let (input, known) = (input.to(device), known.to(device));
                let student = Var::from_tensor(&input.student)?;
                let teacher = known.teacher(tail);
                let loss = sparse_loss(&objective, &student, teacher, &input.labels)?;
                let gradient = loss.backward()?.remove(&student).unwrap();
                let again = loss.backward()?.remove(&student).unwrap();
                assert_eq!(values(&gradient), values(&again));
                let detached = input.student.detach();
                let (alone, output) =
                    sparse_loss_with_output(&objective, &detached, teacher, &input.labels)?;
                assert_eq!(alone.to_scalar::<f32>()?, loss.to_scalar::<f32>()?);
                Ok(((loss.to_scalar()?, gradient), output))
            };
            let ((found, terms), (expected, exact)) = (step(&device)?, step(CPU)?);
            assert!(expected.0 > 0.1);
            assert_near(&found, &expected);
            for (found, exact) in terms.tokens.iter().zip(&exact.tokens) {
                assert_eq!((found.hard, found.valid), (exact.hard, exact.valid));
                assert!((found.loss - exact.loss).abs() <= 4e-6 * (1.0 + exact.loss));
            }
        }
    }
    Ok(())
}

/// Values that are no distribution's are that step's alone; tail uniform is the CPU's.
#[test]
fn bad_sparse_teachers() -> Result<()> {
    let Some(device) = device() else { return Ok(()) };
    let input = Input::new(&[2, 5, 41], [DType::F32; 2], 15);
    let known = Known::new(&input, DType::F32).to(&device);
    let input = input.to(&device);
    let objective = Objective::default();
    let value = |teacher| {
        sparse_loss(&objective, &input.student, teacher, &input.labels)?.to_scalar::<f32>()
    };
    let expected = value(known.teacher(Tail::Bucket))?;
    let mut indices: Vec<i64> = known.indices.to_device(CPU)?.flatten_all()?.to_vec1()?;
    indices[4 * 3 + 1] = 41;
    let wrong = Tensor::from_vec(indices, known.indices.shape(), &device)?;
    let wrong =
        KnownLogProbs::new(&wrong, &known.log_probs).with_target_log_probs(&known.of_targets);
    assert!(value(wrong)?.is_nan());
    assert_eq!(value(known.teacher(Tail::Bucket))?, expected);
    let error = sparse_loss_with_output(&objective, &input.student, wrong, &input.labels);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("token 3"), "{error}");
    let error = value(known.teacher(Tail::Uniform)).unwrap_err().to_string();
    assert!(error.contains("no tail uniform"), "{error}");
    assert_eq!(value(known.teacher(Tail::Bucket))?, expected);
    Ok(())
}
