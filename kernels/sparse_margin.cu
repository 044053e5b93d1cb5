// sparse_margin: the margins of a teacher of which up to K log-probabilities are known for each token, as keys for the
// selection, and what row_sparse needs of its distribution. A warp takes a token in turn. No logit is read.
//
//   tail zero     u = log sum_{k != g} e^{l_k} - l_g            the known probabilities, renormalised
//   bucket        u = log(1 - e^{l_g}) - l_g                    the rest has the mass 1 - sum_k e^{l_k}
//   sampled       the same, and the others, which are draws, share 1 - e^{l_g} as their weights say
#include "math/keys.cuh"
#include "math/online.cuh"
#include "reduce.cuh"
#include "sparse.cuh"

namespace {

// A place among the K, by its log-probability: the larger one wins, then the lower token.
struct Likeliest {
    float log_prob;
    uint32_t column;

    ATKD_DEVICE bool comes_before(const Likeliest &other) const {
        return column != NO_COLUMN && (other.column == NO_COLUMN || log_prob > other.log_prob ||
                                       (log_prob == other.log_prob && column < other.column));
    }
};

// What is wrong with values that are no log-probabilities' of different tokens of the vocabulary, is NaN.
struct Distribution {
    double margin;
    SparseRow row;

    static ATKD_DEVICE Distribution none() { return {nan(""), {nanf(""), nanf(""), nan("")}}; }
};

// Every lane of a warp returns the same.
ATKD_DEVICE Distribution distribution_of(const atkd_sparse &p, uint32_t token, int32_t label, uint32_t &target) {
    uint32_t lane = thread_index() % WARP;
    bool by_teacher = p.rows.batch.target == ATKD_TARGET_TEACHER, wrong = false;
    target = uint32_t(label);
    if (by_teacher) {
        Likeliest best = {NEG_INF, NO_COLUMN};
        ATKD_NO_UNROLL
        for (uint32_t k = lane; k < p.top_k; k += WARP) {
            Likeliest one = {log_prob_of(p, token, k), column_of_index(p, given_index(p, token, k))};
            best = one.comes_before(best) ? one : best;
        }
        ATKD_NO_UNROLL
        for (uint32_t mask = WARP / 2; mask > 0; mask /= 2) {
            Likeliest other = {shuffle_xor(best.log_prob, mask), shuffle_xor(best.column, mask)};
            best = other.comes_before(best) ? other : best;
        }
        target = best.column;
        wrong = target == NO_COLUMN;
    }

    // The target's entry, and the largest of the others.
    float largest = NEG_INF, of_target = NEG_INF;
    uint32_t targets = 0, others = 0;
    ATKD_NO_UNROLL
    for (uint32_t k = lane; k < p.top_k; k += WARP) {
        int64_t index = given_index(p, token, k);
        uint32_t column = column_of_index(p, index);
        if (column == NO_COLUMN) {
            wrong |= index != -1;
            continue;
        }
        float log_prob = log_prob_of(p, token, k);
        // Neither NaN nor +inf.
        wrong |= !(log_prob < -NEG_INF);
        if (column == target) {
            of_target = log_prob;
            targets += 1;
        } else {
            largest = fmaxf(largest, log_prob);
            others += 1;
        }
    }
    largest = max_of_warp(largest);
    of_target = max_of_warp(fmaxf(of_target, NEG_INF));
    targets = reduce_warp(targets, Sum());
    others = reduce_warp(others, Sum());
    float reference = largest == NEG_INF ? 0 : largest;
    double sum = 0;
    ATKD_NO_UNROLL
    for (uint32_t k = lane; k < p.top_k; k += WARP) {
        uint32_t column = column_of_index(p, given_index(p, token, k));
        if (column != NO_COLUMN && column != target) {
            sum += exp(double(log_prob_of(p, token, k)) - double(reference));
        }
    }
    sum = reduce_warp(sum, Sum());

    double infinity = -double(NEG_INF);
    double own = double(of_target);
    bool is_given = p.target_log_probs != nullptr && !by_teacher;
    if (is_given) {
        own = load(p.target_log_probs + token);
        // NaN is not below anything.
        wrong |= !(own <= 1e-4);
    }
    double log_others = double(reference) + log(sum), mass_of_others = exp(log_others);
    double mass = mass_of_others + exp(own);
    uint32_t unknown = p.rows.batch.vocab - others - 1;
    wrong |= targets > 1 || (targets == 0 && !is_given);
    if (p.tail == ATKD_TAIL_SAMPLED) {
        wrong |= own < 0 && sum == 0;
    } else {
        // A row needs a mass; and where no token is left to have the rest, all of it.
        double least = p.tail == ATKD_TAIL_ZERO ? 0 : unknown == 0 ? 1 - p.tolerance : -1;
        wrong |=
            !(mass <= 1 + p.tolerance) || mass < least || (p.tail == ATKD_TAIL_ZERO && sum == 0 && own == -infinity);
    }
    if (warp_ballot(wrong) != 0) {
        report_teacher(p, token);
        return Distribution::none();
    }
    if (p.tail == ATKD_TAIL_ZERO) {
        return {log_others - own, {reference, float(own - double(reference)), -infinity}};
    }
    own = fmin(own, 0.0);
    // Single precision has rounded away what a log-probability of 0 leaves. The other known tokens may still tell, but
    // for draws, whose weights have any unit.
    bool is_sampled = p.tail == ATKD_TAIL_SAMPLED, others_tell = own == 0 && !is_sampled;
    double off_target = others_tell ? mass_of_others : -expm1(own);
    double log_off_target = others_tell ? log_others : log(off_target);
    double rest = is_sampled ? 0 : off_target - mass_of_others;
    double excess = 0;
    // What is left may be rounding in double precision.
    if (rest < 1e-12 * off_target || unknown == 0) {
        rest = 0;
        excess = log_others - log_off_target;
        excess = fabs(excess) < infinity ? excess : 0;
    }
    double relative_to = double(reference) - excess;
    double margin = others_tell ? log_others : log_off_target - own;
    return {margin, {reference, float(own - relative_to), log(rest) - relative_to}};
}

ATKD_DEVICE void margins_of_tokens(const atkd_sparse &p) {
    const atkd_batch &batch = p.rows.batch;
    uint32_t lane = thread_index() % WARP, warps = block_threads() / WARP;
    ATKD_NO_UNROLL
    for (uint32_t token = block_index() * warps + thread_index() / WARP; token < batch.tokens;
         token += p.rows.clusters * warps) {
        int32_t label = label_of(batch, token);
        uint32_t target = 0;
        Distribution found = {};
        if (label == IGNORED_TARGET) {
            bool ignored = given_label(batch, token) == batch.ignore_index;
            found.margin = ignored ? double(NEG_INF) : nan("");
        } else {
            found = distribution_of(p, token, label, target);
        }
        if (lane != 0) {
            continue;
        }
        float margin = float(found.margin);
        if (p.rows.write_keys != 0) {
            store(batch.keys + token, label == IGNORED_TARGET ? 0u : key_of(margin));
        }
        if (batch.target == ATKD_TARGET_TEACHER) {
            store(batch.targets + token, label == IGNORED_TARGET ? IGNORED_TARGET : int32_t(target));
        }
        store(p.margins + token, margin);
        store(p.references + token, found.row.reference);
        store(p.targets + token, found.row.target);
        store(p.rests + token, found.row.rest);
    }
}

} // namespace

ATKD_KERNEL(sparse_margin, atkd_sparse, ATKD_SPARSE_MARGIN) { margins_of_tokens(p); }
