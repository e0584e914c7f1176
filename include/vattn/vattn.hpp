// Verified sparse attention. The order of the includes is the flow of the data.
#pragma once

// clang-format off
#include "vattn/base/config.hpp"             // version, feature macros
#include "vattn/base/status.hpp"             // what a call returns
#include "vattn/kv/view.hpp"            // K and V where they lie
#include "vattn/kv/ragged.hpp"          // sequences of different lengths
#include "vattn/kv/flashinfer.hpp"      // and the caches of engines
#include "vattn/kv/vllm.hpp"
#include "vattn/kv/ggml.hpp"
#include "vattn/kv/gemma_cpp.hpp"
#include "vattn/store/interleaved_store.hpp"  // and one of our own, to gather from
#include "vattn/options.hpp"            // scale, masks, windows, sinks
#include "vattn/select/selector.hpp"    // what is read exactly
#include "vattn/select/index.hpp"       // what is known of keys without reading them
#include "vattn/base/archive.hpp"    // what an index keeps, saved and loaded
#include "vattn/sketch/codes.hpp"       // keys in a few bits
#include "vattn/sketch/product_codes.hpp"  // and in learned ones
#include "vattn/select/quest.hpp"       // selectors of the literature
#include "vattn/select/double_sparsity.hpp"
#include "vattn/select/hash_attention.hpp"
#include "vattn/select/pq_cache.hpp"
#include "vattn/select/magic_pig.hpp"
#include "vattn/select/socket.hpp"
#include "vattn/select/random_ranking.hpp"
#include "vattn/select/calibrated.hpp"  // any of them as estimates
#include "vattn/sample/uniform.hpp"     // what is drawn
#include "vattn/estimate/residual.hpp"  // what the draw says
#include "vattn/certify/certify.hpp"      // sums that merge, evidence, its judgement
#include "vattn/budget/targets.hpp"     // how much is enough: as published
#include "vattn/budget/output.hpp"      // how much is enough: for the output
#include "vattn/certificate.hpp"
#include "vattn/certify/decision.hpp"   // which rows, with which weights
#include "vattn/policy.hpp"             // the slots, and the paper's presets
#include "vattn/exact_attention.hpp"    // every row
#include "vattn/call/looks.hpp"         // looks at a sample until it is enough
#include "vattn/uniform_attention.hpp"  // a ranking's best and a uniform sample
#include "vattn/importance_attention.hpp"  // rows by importance
#include "vattn/store/shuffled_store.hpp"           // a cache made to be sampled
#include "vattn/store/store_attention.hpp"    // and verified decode from it
#include "vattn/index/kv_index.hpp"     // an index beside any cache
#include "vattn/index/index_attention.hpp"  // and verified decode by it
#include "vattn/vattention.hpp"         // the rows that are needed
#include "vattn/kv/reference.hpp"       // an owner where views are taken
#include "vattn/plan.hpp"       // planned once, run by an engine's own threads
#include "vattn/call/audit.hpp"      // whether the promise holds where it is used
// clang-format on
