//! How a call is cut into blocks: a pure function of the shapes and the device.

use std::fmt;

use crate::Dtype;

/// What a plan needs to know of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceProperties {
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of the L2 cache.
    pub l2_bytes: usize,
    /// Blocks that can form a cluster: 8 from compute capability 9.0, 1 before.
    pub largest_cluster: u32,
    /// Bytes of shared memory of a multiprocessor, of which each block takes 1 KiB beside its own.
    pub shared_bytes: usize,
    /// Bytes of shared memory that a block can have.
    pub block_shared_bytes: usize,
}

impl DeviceProperties {
    /// An NVIDIA H200, for plans where there is no device.
    pub const H200: Self = Self {
        multiprocessors: 132,
        l2_bytes: 50 << 20,
        largest_cluster: 8,
        shared_bytes: 233_472,
        block_shared_bytes: 232_448,
    };
}

/// What a plan needs to know of a call. All sizes are at most `i32::MAX`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Rows.
    pub tokens: usize,
    /// Logits in a row.
    pub vocab: usize,
    /// The type of the teacher's logits.
    pub teacher: Dtype,
    /// The type of the student's logits.
    pub student: Dtype,
    /// The type of the gradient; the student's where none is wanted.
    pub gradient: Dtype,
    /// Whether cross entropy needs a sum of its own: it has a weight, and the temperature is not 1.
    pub sum_at_1: bool,
    /// Parts within which hard tokens are selected.
    pub scopes: usize,
}

/// How one kernel is launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaunchShape {
    /// Blocks.
    pub grid: u32,
    /// Threads in a block, whole warps.
    pub block: u32,
    /// Blocks in a cluster.
    pub cluster: u32,
    /// Bytes of dynamic shared memory of a block.
    pub shared: u32,
}

impl fmt::Display for LaunchShape {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let plural = if self.grid == 1 { "" } else { "s" };
        write!(f, "{} block{plural} of {} threads", self.grid, self.block)?;
        if self.cluster > 1 {
            write!(f, ", clusters of {}", self.cluster)?;
        }
        if self.shared > 0 {
            write!(f, ", {:.1} KB of shared memory", f64::from(self.shared) / 1e3)?;
        }
        Ok(())
    }
}

/// The launch of every kernel that a call may need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// `teacher_margin`: the teacher's rows are read once.
    pub margin: LaunchShape,
    /// `count_valid`: the labels are read.
    pub count: LaunchShape,
    /// `select_hard`: the keys are read from the L2 cache.
    pub select: LaunchShape,
    /// Both models' rows are read and the gradient is written, by `row_resident` or `row_stream`.
    pub rows: LaunchShape,
    /// Whether a cluster's registers hold a row, so that it is read once (`row_resident`); else it is read
    /// twice (`row_stream`).
    pub resident: bool,
    /// Bytes of the rows that are in flight at once: what a second read must find in the L2 cache.
    pub rows_in_flight_bytes: usize,
    /// `sum_losses`.
    pub sum: LaunchShape,
}

const WARP: usize = 32;
/// Logits that a thread handles at once, as in kernels/memory.cuh.
const CHUNK: usize = 8;
/// Of the launch bounds of each kernel: threads a block, blocks a multiprocessor.
const MARGIN_THREADS: usize = 384;
const STREAM_THREADS: usize = 384;
const RESIDENT_THREADS: usize = 256;
const ROWS_BLOCKS: usize = 2;
const COUNT_THREADS: usize = 256;
const SELECT_THREADS: usize = 1024;
/// Bytes of each model that a thread of `row_resident` holds in registers.
const HELD_BYTES: usize = 128;

/// Threads for `work` items, `each` of them a thread, up to `most`.
fn threads(work: usize, each: usize, most: usize) -> u32 {
    work.div_ceil(each).next_multiple_of(WARP).clamp(WARP, most) as u32
}

/// A grid of whole clusters, as large as a device launches at most.
fn shape(grid: usize, block: u32, cluster: u32) -> LaunchShape {
    let most = i32::MAX as u32 / cluster * cluster;
    LaunchShape { grid: u32::try_from(grid).unwrap_or(most).min(most), block, cluster, shared: 0 }
}

impl Plan {
    /// The plan of a call on a device.
    pub fn new(device: &DeviceProperties, problem: &Problem) -> Self {
        let Problem { tokens, vocab, scopes, .. } = *problem;
        // A row that starts off a chunk's boundary has up to one more.
        let chunks = (vocab + CHUNK - 1).div_ceil(CHUNK);
        let largest_scope = tokens.div_ceil(scopes.max(1));
        let select_blocks = (largest_scope.div_ceil(SELECT_THREADS).next_power_of_two() as u32)
            .clamp(1, device.largest_cluster);
        let resident = Self::resident(device, problem, chunks);
        let rows = resident.unwrap_or_else(|| Self::stream(device, problem, chunks));
        Self {
            margin: shape(tokens, threads(chunks, 4, MARGIN_THREADS), 1),
            count: shape(tokens.div_ceil(COUNT_THREADS), COUNT_THREADS as u32, 1),
            select: shape(
                scopes * select_blocks as usize,
                threads(largest_scope, 1, SELECT_THREADS),
                select_blocks,
            ),
            rows,
            resident: resident.is_some(),
            rows_in_flight_bytes: in_flight_bytes(device, problem, rows.cluster),
            sum: shape(1, threads(tokens, 4, 1024), 1),
        }
    }

    /// Clusters as small as hold a row, if any does.
    fn resident(
        device: &DeviceProperties,
        problem: &Problem,
        chunks: usize,
    ) -> Option<LaunchShape> {
        let Problem { teacher, student, gradient, .. } = *problem;
        if teacher != student || student != gradient || problem.sum_at_1 {
            return None;
        }
        let held = HELD_BYTES / (CHUNK * student.size());
        let cluster = chunks.div_ceil(RESIDENT_THREADS * held).next_power_of_two();
        if cluster > device.largest_cluster as usize
            || problem.tokens.saturating_mul(cluster) > i32::MAX as usize
        {
            return None;
        }
        let block = threads(chunks, held * cluster, RESIDENT_THREADS);
        Some(shape(problem.tokens * cluster, block, cluster as u32))
    }

    /// Clusters only as large as it takes for the rows in flight to fill half of the L2 cache, and only
    /// where every thread still has a chunk.
    fn stream(device: &DeviceProperties, problem: &Problem, chunks: usize) -> LaunchShape {
        let tokens = problem.tokens;
        let mut cluster = 1;
        while cluster < device.largest_cluster
            && in_flight_bytes(device, problem, cluster) > device.l2_bytes / 2
            && chunks >= 2 * cluster as usize * STREAM_THREADS
            && tokens.saturating_mul(2 * cluster as usize) <= i32::MAX as usize
        {
            cluster *= 2;
        }
        let block = threads(chunks, 4 * cluster as usize, STREAM_THREADS);
        shape(tokens * cluster as usize, block, cluster)
    }
}

fn in_flight_bytes(device: &DeviceProperties, problem: &Problem, cluster: u32) -> usize {
    let blocks = device.multiprocessors as usize * ROWS_BLOCKS;
    let rows = (blocks / cluster as usize).clamp(1, problem.tokens.max(1));
    rows * problem.vocab * (problem.teacher.size() + problem.student.size())
}

#[cfg(test)]
mod tests {
    use super::*;

    const H200: DeviceProperties = DeviceProperties::H200;
    const A100: DeviceProperties = DeviceProperties {
        multiprocessors: 108,
        l2_bytes: 40 << 20,
        largest_cluster: 1,
        shared_bytes: 167_936,
        block_shared_bytes: 166_912,
    };

    fn problem(tokens: usize, vocab: usize, teacher: Dtype, student: Dtype) -> Problem {
        Problem { tokens, vocab, teacher, student, gradient: student, sum_at_1: false, scopes: 1 }
    }

    #[test]
    fn streamed_rows_in_flight_fit_the_cache() {
        let rows = |device, tokens, vocab| {
            let problem = problem(tokens, vocab, Dtype::F16, Dtype::Bf16);
            let plan = Plan::new(device, &problem);
            assert!(!plan.resident && plan.rows.grid == tokens as u32 * plan.rows.cluster);
            (plan.rows.cluster, plan.rows_in_flight_bytes)
        };
        for vocab in [32_000, 50_257, 128_256, 151_936] {
            let (_, bytes) = rows(&H200, 8192, vocab);
            assert!(bytes <= H200.l2_bytes / 2, "{vocab}: {bytes}");
        }
        assert_eq!(rows(&H200, 8192, 128_256).0, 8);
        // Larger clusters there are not; the whole cache holds the rows still.
        assert!(rows(&H200, 8192, 256_000).1 < H200.l2_bytes);
        assert_eq!(rows(&H200, 8192, 4096).0, 1);
        assert_eq!(rows(&A100, 8192, 128_256).0, 1);
        // So few rows are in flight together anyway.
        assert_eq!(rows(&H200, 32, 128_256).0, 1);
    }

    #[test]
    fn resident_rows_fit_the_registers() {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            let held = HELD_BYTES / dtype.size();
            for vocab in (1..140_000).step_by(97).chain([4096, 8192, 32_000, 128_256, 131_065]) {
                let plan = Plan::new(&H200, &problem(8192, vocab, dtype, dtype));
                // Up to 7 places before the row in its first chunk.
                let room = (plan.rows.block * plan.rows.cluster) as usize * held;
                assert!(!plan.resident || room >= vocab + 7, "{vocab} {dtype}: {plan:?}");
                assert_eq!(plan.resident, vocab + 7 <= 8 * 256 * held, "{vocab} {dtype}");
            }
        }
        let rows = |vocab| Plan::new(&H200, &problem(8192, vocab, Dtype::Bf16, Dtype::Bf16)).rows;
        assert_eq!((rows(4096).block, rows(4096).cluster), (96, 1));
        assert_eq!((rows(32_000).block, rows(32_000).cluster), (256, 2));
        assert_eq!((rows(128_256).block, rows(128_256).cluster), (256, 8));
        let f32 = |vocab| Plan::new(&A100, &problem(8192, vocab, Dtype::F32, Dtype::F32));
        assert!(f32(8000).resident && !f32(9000).resident);
        let mut mixed = problem(8192, 32_000, Dtype::Bf16, Dtype::Bf16);
        mixed.sum_at_1 = true;
        assert!(!Plan::new(&H200, &mixed).resident);
        mixed = Problem { sum_at_1: false, gradient: Dtype::F32, ..mixed };
        assert!(!Plan::new(&H200, &mixed).resident);
    }

    #[test]
    fn small_work_takes_small_blocks() {
        let plan = Plan::new(&H200, &problem(1, 1, Dtype::F32, Dtype::F32));
        let one_warp = LaunchShape { grid: 1, block: 32, cluster: 1, shared: 0 };
        assert_eq!([plan.margin, plan.rows, plan.select, plan.sum], [one_warp; 4]);
        assert_eq!(plan.count, LaunchShape { grid: 1, block: 256, cluster: 1, shared: 0 });
        let many = problem(131_072, 32_000, Dtype::Bf16, Dtype::Bf16);
        let shape = LaunchShape { grid: 8, block: 1024, cluster: 8, shared: 0 };
        assert_eq!(Plan::new(&H200, &many).select, shape);
        let sequences = Problem { scopes: 64, ..problem(8192, 32_000, Dtype::Bf16, Dtype::Bf16) };
        let shape = LaunchShape { grid: 64, block: 128, cluster: 1, shared: 0 };
        assert_eq!(Plan::new(&H200, &sequences).select, shape);
    }

    #[test]
    fn shapes_in_words() {
        let shape = LaunchShape { grid: 264, block: 256, cluster: 2, shared: 64_100 };
        let words = "264 blocks of 256 threads, clusters of 2, 64.1 KB of shared memory";
        assert_eq!(shape.to_string(), words);
    }

    #[test]
    fn grids_stay_within_what_a_device_launches() {
        let most = i32::MAX as usize;
        for vocab in [1, 100_000, most] {
            let problem = Problem { scopes: most, ..problem(most, vocab, Dtype::F32, Dtype::F32) };
            let plan = Plan::new(&H200, &problem);
            for shape in [plan.margin, plan.count, plan.select, plan.rows, plan.sum] {
                assert!(shape.grid <= i32::MAX as u32, "{shape:?}");
                assert!(shape.grid.is_multiple_of(shape.cluster), "{shape:?}");
            }
            assert_eq!(plan.rows.grid, i32::MAX as u32);
        }
    }
}
