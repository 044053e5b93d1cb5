// Kernels with the mistakes that the simulator must catch, one each.
#include "../batch.cuh"

// Launch bounds.
#define BROKEN_THREADS 64
#define BROKEN_WARP_THREADS 32

typedef struct {
    uint32_t *data; // one element a thread
} atkd_broken;

// Reads what another thread writes, without the barrier between.
ATKD_KERNEL(broken_missing_barrier, atkd_broken, BROKEN) {
    ATKD_SHARED(uint32_t, cells, 64);
    cells[thread_index()] = 0;
    ATKD_SYNC_BLOCK();
    cells[thread_index()] = thread_index() + 1;
    store(p.data + thread_index(), uint32_t(cells[63 - thread_index()]));
}

// Reads what another lane wrote, after a shuffle, which orders no memory.
ATKD_KERNEL(broken_missing_warp_barrier, atkd_broken, BROKEN) {
    ATKD_SHARED(uint32_t, cells, 64);
    cells[thread_index()] = 1;
    uint32_t other = shuffle_xor(thread_index(), 1);
    store(p.data + thread_index(), uint32_t(cells[other]));
}

// One thread reads while others still add.
ATKD_KERNEL(broken_addition, atkd_broken, BROKEN) {
    ATKD_SHARED(uint32_t, cells, 1);
    if (thread_index() == 0) {
        cells[0] = 0;
    }
    ATKD_SYNC_BLOCK();
    ATKD_ADD_SHARED(cells, 0, 1u);
    if (thread_index() == 0) {
        store(p.data, uint32_t(cells[0]));
    }
}

// Half of the threads never reach the barrier.
ATKD_KERNEL(broken_divergent_barrier, atkd_broken, BROKEN) {
    if (thread_index() < 32) {
        ATKD_SYNC_BLOCK();
    }
    store(p.data + thread_index(), 1u);
}

// Two groups wait at different barriers.
ATKD_KERNEL(broken_two_barriers, atkd_broken, BROKEN) {
    if (thread_index() < 32) {
        ATKD_SYNC_BLOCK();
    } else {
        ATKD_SYNC_BLOCK();
    }
    store(p.data + thread_index(), 1u);
}

// A lane leaves before the shuffle that the others wait for it at.
ATKD_KERNEL(broken_shuffle, atkd_broken, BROKEN) {
    if (thread_index() % WARP != 5) {
        store(p.data + thread_index(), shuffle_xor(thread_index(), 1));
    }
}

ATKD_KERNEL(broken_read_outside, atkd_broken, BROKEN) {
    store(p.data + thread_index(), load(p.data + thread_index() + 1));
}

ATKD_KERNEL(broken_write_outside, atkd_broken, BROKEN) { store(p.data - thread_index(), 1u); }

ATKD_KERNEL(broken_alignment, atkd_broken, BROKEN) {
    if (thread_index() == 0) {
        store16(p.data, load16<false>(p.data + 1));
    }
}

ATKD_KERNEL(broken_unwritten_shared, atkd_broken, BROKEN) {
    ATKD_SHARED(uint32_t, cells, 64);
    if (thread_index() != 9) {
        cells[thread_index()] = 1;
    }
    ATKD_SYNC_BLOCK();
    store(p.data + thread_index(), uint32_t(cells[thread_index()]));
}

ATKD_KERNEL(broken_shared_bounds, atkd_broken, BROKEN) {
    ATKD_SHARED(uint32_t, cells, 32);
    cells[thread_index()] = 1;
    store(p.data + thread_index(), 1u);
}

// Reads what another block writes, without the cluster's barrier between.
ATKD_KERNEL(broken_missing_cluster_barrier, atkd_broken, BROKEN_WARP) {
    ATKD_SHARED(uint32_t, cells, 32);
    cells[thread_index()] = 0;
    ATKD_SYNC_CLUSTER();
    cells[thread_index()] = 7;
    uint32_t other = ATKD_REMOTE(cells, thread_index(), 1 - cluster_rank());
    ATKD_SYNC_CLUSTER();
    store(p.data + block_index() * 32 + thread_index(), other);
}

// One block never reaches the cluster's barrier.
ATKD_KERNEL(broken_cluster_barrier, atkd_broken, BROKEN_WARP) {
    if (cluster_rank() == 0) {
        ATKD_SYNC_CLUSTER();
    }
    store(p.data + thread_index(), 1u);
}

// A block ends while another still reads its shared memory.
ATKD_KERNEL(broken_remote, atkd_broken, BROKEN_WARP) {
    ATKD_SHARED(uint32_t, cells, 32);
    cells[thread_index()] = thread_index();
    ATKD_SYNC_CLUSTER();
    if (cluster_rank() == 1) {
        for (uint32_t round = 0; round < 100; round++) {
            ATKD_SYNC_BLOCK();
        }
        store(p.data + thread_index(), uint32_t(ATKD_REMOTE(cells, thread_index(), 0)));
    }
}

// Only one of two blocks comes to where both should meet.
ATKD_KERNEL(broken_team, atkd_broken, BROKEN_WARP) {
    if (block_index() == 0) {
        if (thread_index() == 0) {
            add_release(p.data, 1u << 30);
        }
        ATKD_WAIT_FOR_SENSE(p.data, 0);
    }
}

// There are two blocks in the cluster.
ATKD_KERNEL(broken_rank, atkd_broken, BROKEN_WARP) {
    ATKD_SHARED(uint32_t, cells, 32);
    store(p.data + thread_index(), uint32_t(ATKD_REMOTE(cells, 0, 2)));
}

constexpr uint32_t ALL = 256; // bytes of the data

template <class Barriers> void make(Barriers &full) {
    if (thread_index() == 0) {
        ATKD_INIT_BARRIER(full, 0, 1);
        publish_barriers();
    }
    ATKD_SYNC_BLOCK();
}

template <class Barriers>
void load_all(const atkd_broken &p, StagedMemory staged, Barriers &full, uint32_t expected = ALL) {
    if (thread_index() == 0) {
        ATKD_EXPECT(full, 0, expected);
        ATKD_BULK_LOAD(staged, 0, p.data, ALL, full, 0);
    }
}

// The wait is one thread's, with no barrier after it.
ATKD_KERNEL(broken_unwaited_read, atkd_broken, BROKEN) {
    ATKD_STAGED(staged);
    ATKD_SHARED(Barrier, full, 1);
    make(full);
    load_all(p, staged, full);
    ATKD_SYNC_BLOCK();
    if (thread_index() == 63) {
        ATKD_WAIT(full, 0, 0);
    }
    store(p.data + thread_index(), load_staged(staged, 0).word[0]);
}

ATKD_KERNEL(broken_early_parity, atkd_broken, BROKEN) {
    ATKD_STAGED(staged);
    ATKD_SHARED(Barrier, full, 1);
    make(full);
    load_all(p, staged, full);
    ATKD_SYNC_BLOCK();
    ATKD_WAIT(full, 0, 1);
    store(p.data + thread_index(), load_staged(staged, 0).word[0]);
}

ATKD_KERNEL(broken_late_parity, atkd_broken, BROKEN) {
    ATKD_STAGED(staged);
    ATKD_SHARED(Barrier, full, 1);
    make(full);
    load_all(p, staged, full);
    ATKD_WAIT(full, 0, 0);
    ATKD_WAIT(full, 0, 1);
}

ATKD_KERNEL(broken_few_bytes, atkd_broken, BROKEN) {
    ATKD_STAGED(staged);
    ATKD_SHARED(Barrier, full, 1);
    make(full);
    load_all(p, staged, full, ALL / 2);
    ATKD_WAIT(full, 0, 0);
}

ATKD_KERNEL(broken_many_bytes, atkd_broken, BROKEN) {
    ATKD_STAGED(staged);
    ATKD_SHARED(Barrier, full, 1);
    make(full);
    load_all(p, staged, full, 2 * ALL);
    ATKD_WAIT(full, 0, 0);
}

// The second comes before the first one's bytes.
ATKD_KERNEL(broken_arrivals, atkd_broken, BROKEN) {
    ATKD_STAGED(staged);
    ATKD_SHARED(Barrier, full, 1);
    make(full);
    if (thread_index() == 0) {
        ATKD_EXPECT(full, 0, ALL);
        ATKD_ARRIVE(full, 0);
        ATKD_BULK_LOAD(staged, 0, p.data, ALL, full, 0);
    }
    ATKD_WAIT(full, 0, 0);
}

// Other threads do not wait for the barrier to be made.
ATKD_KERNEL(broken_early_barrier, atkd_broken, BROKEN) {
    ATKD_SHARED(Barrier, full, 1);
    if (thread_index() == 0) {
        ATKD_SYNC_BLOCK();
        ATKD_INIT_BARRIER(full, 0, 63);
        publish_barriers();
    } else {
        ATKD_ARRIVE(full, 0);
        ATKD_SYNC_BLOCK();
    }
    store(p.data + thread_index(), 1u);
}

// Some threads still read what others refill.
ATKD_KERNEL(broken_refill_of_the_read, atkd_broken, BROKEN) {
    ATKD_STAGED(staged);
    ATKD_SHARED(Barrier, full, 1);
    make(full);
    load_all(p, staged, full);
    ATKD_WAIT(full, 0, 0);
    load_all(p, staged, full);
    if (thread_index() > 0) {
        load_staged(staged, 0);
    }
    ATKD_WAIT(full, 0, 1);
}

// A lane says that its warp has read, which is not there yet to say so.
ATKD_KERNEL(broken_arrival_for_others, atkd_broken, BROKEN) {
    ATKD_STAGED(staged);
    ATKD_SHARED(Barrier, full, 1);
    ATKD_SHARED(Barrier, read, 1);
    if (thread_index() == 0) {
        ATKD_INIT_BARRIER(read, 0, 2);
    }
    make(full);
    load_all(p, staged, full);
    ATKD_WAIT(full, 0, 0);
    load_staged(staged, 0);
    if (thread_index() % WARP == 0) {
        ATKD_ARRIVE(read, 0);
    }
    if (thread_index() == 0) {
        ATKD_WAIT(read, 0, 0);
    }
    load_all(p, staged, full);
    ATKD_WAIT(full, 0, 1);
}

ATKD_KERNEL(broken_bulk_alignment, atkd_broken, BROKEN) {
    ATKD_STAGED(staged);
    ATKD_SHARED(Barrier, full, 1);
    make(full);
    ATKD_BULK_LOAD(staged, 0, p.data + 1, 16, full, 0);
}

ATKD_KERNEL(broken_bulk_size, atkd_broken, BROKEN) {
    ATKD_STAGED(staged);
    ATKD_SHARED(Barrier, full, 1);
    make(full);
    ATKD_BULK_LOAD(staged, 0, p.data, 24, full, 0);
}

ATKD_KERNEL(broken_prefetch_size, atkd_broken, BROKEN) { bulk_prefetch(p.data, 24); }

ATKD_KERNEL(broken_prefetch_outside, atkd_broken, BROKEN) { bulk_prefetch(p.data, 2 * ALL); }

ATKD_KERNEL(broken_bulk_outside, atkd_broken, BROKEN) {
    ATKD_STAGED(staged);
    ATKD_SHARED(Barrier, full, 1);
    make(full);
    ATKD_BULK_LOAD(staged, 0, p.data, 2 * ALL, full, 0);
}

// There are 512 bytes.
ATKD_KERNEL(broken_staged_bounds, atkd_broken, BROKEN) {
    ATKD_STAGED(staged);
    ATKD_SHARED(Barrier, full, 1);
    make(full);
    ATKD_BULK_LOAD(staged, 512 - 128, p.data, ALL, full, 0);
}

ATKD_KERNEL(broken_unwaited_load, atkd_broken, BROKEN) {
    ATKD_STAGED(staged);
    ATKD_SHARED(Barrier, full, 1);
    make(full);
    load_all(p, staged, full);
}

// As row_sparse begins a tile of its row: 16 bytes by a thread in turn.
void copy_all(const atkd_broken &p, StagedMemory staged) {
    if (thread_index() < ALL / 16) {
        copy_async(staged, 16 * thread_index(), p.data + 4 * thread_index());
    }
}

// The bytes that another thread has copied.
uint32_t copied_by_another(StagedMemory staged) {
    return load_staged(staged, 16 * ((thread_index() + 1) % (ALL / 16))).word[0];
}

// A thread's own copy is not there before its wait.
ATKD_KERNEL(broken_copy_before_its_wait, atkd_broken, BROKEN) {
    ATKD_STAGED(staged);
    copy_all(p, staged);
    if (thread_index() < ALL / 16) {
        store(p.data + thread_index(), load_staged(staged, 16 * thread_index()).word[0]);
    }
    wait_for_copies();
}

// A wait is for a thread's own copies: without a barrier, those of others are not there.
ATKD_KERNEL(broken_copy_of_another, atkd_broken, BROKEN) {
    ATKD_STAGED(staged);
    copy_all(p, staged);
    wait_for_copies();
    store(p.data + thread_index(), copied_by_another(staged));
}

// A barrier waits for no copy that its threads have not waited for.
ATKD_KERNEL(broken_barrier_for_copies, atkd_broken, BROKEN) {
    ATKD_STAGED(staged);
    copy_all(p, staged);
    ATKD_SYNC_BLOCK();
    store(p.data + thread_index(), copied_by_another(staged));
    wait_for_copies();
}

// The next tile goes over one that others still read.
ATKD_KERNEL(broken_copy_over_the_read, atkd_broken, BROKEN) {
    ATKD_STAGED(staged);
    copy_all(p, staged);
    wait_for_copies();
    ATKD_SYNC_BLOCK();
    copied_by_another(staged);
    copy_all(p, staged);
    wait_for_copies();
}

// An element becomes -inf where another thread still reads.
ATKD_KERNEL(broken_element_over_the_read, atkd_broken, BROKEN) {
    ATKD_STAGED(staged);
    copy_all(p, staged);
    wait_for_copies();
    ATKD_SYNC_BLOCK();
    copied_by_another(staged);
    if (thread_index() < ALL / 16) {
        store_staged_element(staged, 16 * thread_index(), NEG_INF);
    }
}

ATKD_KERNEL(broken_unwaited_copy, atkd_broken, BROKEN) {
    ATKD_STAGED(staged);
    copy_all(p, staged);
}

ATKD_KERNEL(broken_copy_alignment, atkd_broken, BROKEN) {
    ATKD_STAGED(staged);
    copy_async(staged, 0, p.data + 1);
}

ATKD_KERNEL(broken_copy_outside, atkd_broken, BROKEN) {
    ATKD_STAGED(staged);
    copy_async(staged, 0, p.data + 4 * thread_index());
}

// There are 512 bytes.
ATKD_KERNEL(broken_copy_bounds, atkd_broken, BROKEN) {
    ATKD_STAGED(staged);
    copy_async(staged, 512, p.data);
}

typedef struct {
    const uint32_t *from;
    uint32_t *to;
    uint32_t rows; // of 1024 bytes
} atkd_staged_rows;

// Not broken: adds 1 to every number, each block of the cluster on its own rows, of which two are staged.
ATKD_KERNEL(staged_rows, atkd_staged_rows, BROKEN) {
    constexpr uint32_t BYTES = 1024;
    ATKD_STAGED(staged);
    ATKD_SHARED(Barrier, full, 2);
    ATKD_SHARED(Barrier, read, 2);
    const uint32_t *from = p.from + block_index() * p.rows * (BYTES / 4);
    uint32_t *to = p.to + block_index() * p.rows * (BYTES / 4);
    bool copies = thread_index() == 0;
    if (copies) {
        for (uint32_t stage = 0; stage < 2; stage++) {
            ATKD_INIT_BARRIER(full, stage, 1);
            ATKD_INIT_BARRIER(read, stage, 64);
        }
        publish_barriers();
    }
    ATKD_SYNC_BLOCK();
    for (uint32_t row = 0; row <= p.rows; row++) {
        if (copies && row < p.rows) {
            uint32_t stage = row % 2;
            if (row >= 2) {
                ATKD_WAIT(read, stage, (row - 2) / 2 % 2);
            }
            ATKD_EXPECT(full, stage, BYTES);
            // In two parts, the last one first.
            const uint32_t *at = from + row * (BYTES / 4);
            ATKD_BULK_LOAD(staged, stage * BYTES + 256, at + 64, BYTES - 256, full, stage);
            ATKD_BULK_LOAD(staged, stage * BYTES, at, 256, full, stage);
        }
        if (row > 0) {
            uint32_t stage = (row - 1) % 2, parity = (row - 1) / 2 % 2;
            ATKD_WAIT(full, stage, parity);
            Bytes16 value = load_staged(staged, stage * BYTES + 16 * thread_index());
            ATKD_ARRIVE(read, stage);
            for (uint32_t i = 0; i < 4; i++) {
                value.word[i]++;
            }
            store16(to + (row - 1) * (BYTES / 4) + 4 * thread_index(), value);
        }
    }
}

// The message carries another epoch than the one that is waited for.
ATKD_KERNEL(broken_post, atkd_broken, BROKEN_WARP) {
    auto *at = reinterpret_cast<Bytes16 *>(p.data);
    if (block_index() == 0) {
        store_message(at, {{1, 2, 3, 2 * 7}});
    } else {
        Messages<1> messages;
        ATKD_WAIT_FOR_MESSAGES(messages, at, 8);
        store(p.data + 8 + thread_index(), messages.part[0].word[0]);
    }
}
