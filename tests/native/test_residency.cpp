#include "nn/residency.h"

#include <doctest/doctest.h>

using namespace sd;

namespace {

// Three of 10, 20 and 30 bytes, used in the order 2, 0, 1; the last is half in a file.
std::vector<Component> three() {
    return {{"a", 10, 0, true, 2}, {"b", 20, 0, true, 3}, {"c", 15, 15, true, 1}};
}

using Indices = std::vector<size_t>;

} // namespace

TEST_CASE("nobody leaves where there is room") {
    CHECK(leaving(three(), {}, 5, 5).empty());
    CHECK(leaving(three(), {}, 0, 0).empty());
}

TEST_CASE("the longest unused leaves first, and no more than it takes") {
    CHECK(leaving(three(), {}, 6, 5) == Indices{2});
    CHECK(leaving(three(), {}, 36, 5) == Indices{2, 0});
    CHECK(leaving(three(), {}, 46, 5) == Indices{2, 0, 1});
}

TEST_CASE("who is needed stays, and who is away cannot leave") {
    CHECK(leaving(three(), {2}, 6, 5) == Indices{0});
    CHECK(leaving(three(), {0, 1, 2}, 1000, 5).empty());
    std::vector<Component> some = three();
    some[2].here = false;
    CHECK(leaving(some, {}, 6, 5) == Indices{0});
    some[0].copied = 0; // nothing would be won
    CHECK(leaving(some, {}, 6, 5) == Indices{1});
}
