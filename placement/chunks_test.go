package placement

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
)

var update = flag.Bool("update", false, "rewrite the golden files")

const (
	mib = 1 << 20
	gib = 1 << 30
)

// store is store n on host-n: up, new to the volume, 10 GiB, nothing used.
func store(n int, change ...func(*Store)) Store {
	s := Store{ID: ids.StoreID{byte(n)}, Host: fmt.Sprintf("host-%d", n), Up: true, CapacityBytes: 10 * gib}
	for _, c := range change {
		c(&s)
	}
	return s
}

func down(s *Store)    { s.Up = false }
func full(s *Store)    { s.UsedBytes = s.CapacityBytes - 10*mib }
func member(s *Store)  { s.Member, s.InSync = true, true }
func behind(s *Store)  { s.Member = true }
func drained(s *Store) { s.Drained = true }
func in(domain string) func(*Store) {
	return func(s *Store) { s.Domain = domain }
}
func used(bytes uint64) func(*Store) {
	return func(s *Store) { s.UsedBytes = bytes }
}

func request(stores ...Store) ChunkRequest {
	return ChunkRequest{Seed: 1, Count: 1, Replicas: 3, ChunkBytes: 64 * mib, Stores: stores}
}

// numbers are the first bytes of a chunk's stores.
func numbers(stores []ids.StoreID) []int {
	var out []int
	for _, s := range stores {
		out = append(out, int(s[0]))
	}
	return out
}

func TestChunkGoesTo(t *testing.T) {
	for _, c := range []struct {
		name     string
		prefer   string
		minReady int
		stores   []Store
		first    int   // 0: any
		chosen   []int // any order
	}{
		{"three hosts", "", 0, []Store{store(1), store(2), store(3)}, 0, []int{1, 2, 3}},
		{"the writer's host is first", "host-3", 0, []Store{store(1), store(2), store(3)}, 3, []int{1, 2, 3}},
		{"members before others", "", 0, []Store{store(1), store(2, member), store(3, member), store(4, member), store(5)}, 0, []int{2, 3, 4}},
		{"the writer's host before members", "host-5", 0, []Store{store(1, member), store(2, member), store(5)}, 5, []int{1, 2, 5}},
		{"a writer's host that is behind waits", "host-1", 0, []Store{store(1, behind), store(2, member), store(3, member), store(4)}, 0, []int{2, 3, 4}},
		{"a down member is replaced", "", 1, []Store{store(1, member), store(2, member, down), store(3, member), store(4)}, 0, []int{1, 3, 4}},
		{"a full member is replaced", "", 1, []Store{store(1, member), store(2, member, full), store(3, member), store(4)}, 0, []int{1, 3, 4}},
		{"up and behind before down", "", 1, []Store{store(1, member), store(2, behind), store(3, behind, down), store(4, down)}, 1, []int{1, 2, 3}},
		{"down and behind before down members", "", 1, []Store{store(1, member), store(2, member, down), store(3, behind, down), store(4, down)}, 1, []int{1, 3, 2}},
		{"one host of three is dead", "host-1", 1, []Store{store(1, member), store(2, member, down), store(3, member)}, 1, []int{1, 3, 2}},
		{"a drained host gets nothing", "host-1", 1, []Store{store(1, member, drained), store(2, member), store(3, used(5*gib)), store(4)}, 0, []int{2, 3, 4}},
		{"not even before a nearly full one", "", 1, []Store{store(1, drained), store(2), store(3, used(9900*mib), func(s *Store) { s.Slow = true }), store(4)}, 0, []int{2, 3, 4}},
		{"a drained host is the last resort", "", 1, []Store{store(1), store(2), store(3, drained)}, 0, []int{1, 2, 3}},
		{"but before one that is down", "", 1, []Store{store(1), store(2, down, member), store(3, drained), store(4, behind)}, 0, []int{1, 3, 4}},
		{"of those that are down, the drained one is last", "", 1, []Store{store(1), store(2), store(3, down, drained), store(4, down)}, 0, []int{1, 2, 4}},
		{"racks differ", "", 0, []Store{store(1, member, in("a")), store(2, member, in("a")), store(3, in("b")), store(4, down, in("b")), store(5, in("c"))}, 0, []int{3, 5}},
	} {
		t.Run(c.name, func(t *testing.T) {
			req := request(c.stores...)
			req.PreferHost, req.MinReady = c.prefer, c.minReady
			plan, err := PlaceChunks(req)
			if err != nil {
				t.Fatal(err)
			}
			got := numbers(plan.Chunks[0])
			if len(got) != 3 || (c.first > 0 && got[0] != c.first) {
				t.Fatalf("chose %v, want %d first", got, c.first)
			}
			for _, want := range c.chosen {
				if !slices.Contains(got, want) {
					t.Errorf("chose %v, want %d in it", got, want)
				}
			}
		})
	}
}

func TestChunkErrorsSayWhatIsMissing(t *testing.T) {
	for _, c := range []struct {
		name     string
		req      ChunkRequest
		minReady int
		kind     status.Kind
		text     string
	}{
		{"down", request(store(1), store(2), store(3, down)), 0, status.Unavailable,
			"a chunk of 64.0 MiB needs 3 hosts with free space that are up and in sync, there are 2: host-3 is down; bring one back or ask again"},
		{"full", request(store(1), store(2, full), store(3, down)), 1, status.NoSpace,
			"a chunk of 64.0 MiB needs 3 hosts with free space, there are 2: host-2 is full (10.0 MiB of 10.0 GiB free); add stores or free space"},
		{"all down", request(store(1, down), store(2, down), store(3, behind)), 1, status.Unavailable,
			"a chunk of 64.0 MiB needs 1 host with free space that are up and in sync, there is none: host-1 is down, host-2 is down, host-3 is still catching up; bring one back or ask again"},
		{"too few", request(store(1), store(2)), 0, status.NoSpace,
			"a chunk of 64.0 MiB needs 3 hosts with free space, there are 2; add stores or free space"},
		{"no stores", request(), 0, status.NoSpace,
			"a chunk of 64.0 MiB needs 3 hosts with free space, there is none; add stores or free space"},
		{"racks", request(store(1, in("a")), store(2, in("a")), store(3, in("b")), store(4, in("c"), down, full)), 0, status.NoSpace,
			"a chunk of 64.0 MiB needs 3 failure domains with free space, there are 2: c is down and full (10.0 MiB free); add stores or free space"},
		{"twice", request(store(1), store(1)), 0, status.Invalid, "store 01000000 is listed twice in one request"},
		{"no replicas", ChunkRequest{Count: 1, ChunkBytes: 1}, 0, status.Invalid, "cannot place 0 replicas of a chunk: 1 to 16 are possible"},
		{"no count", ChunkRequest{Replicas: 1, ChunkBytes: 1}, 0, status.Invalid, "cannot place 0 chunks: ask for 1 to 65536 at a time"},
		{"no size", ChunkRequest{Count: 1, Replicas: 1}, 0, status.Invalid, "cannot place chunks of 0 bytes: 1 byte to 1.0 TiB are possible"},
		{"too ready", ChunkRequest{Count: 1, Replicas: 1, ChunkBytes: 1}, 2, status.Invalid, "2 of 1 replicas cannot be ready: ask for 1 to 1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.req.MinReady = c.minReady
			plan, err := PlaceChunks(c.req)
			if !errors.Is(err, c.kind) || err.Error() != c.text {
				t.Fatalf("got %v: %v\nwant %v: %s", status.Of(err), err, c.kind, c.text)
			}
			if plan.Chunks != nil {
				t.Errorf("an error came with places %v", plan.Chunks)
			}
			if c.kind != status.Invalid && len(plan.Scores) != len(c.req.Stores) {
				t.Errorf("%d scores of %d stores", len(plan.Scores), len(c.req.Stores))
			}
		})
	}
}

func TestManyListedDomainsAreCounted(t *testing.T) {
	var stores []Store
	for n := 1; n <= 9; n++ {
		stores = append(stores, store(n, full))
	}
	_, err := PlaceChunks(request(stores...))
	if err == nil || !strings.Contains(err.Error(), "and 3 more;") {
		t.Fatalf("got %v", err)
	}
}

// A batch moves on to other stores once it has planned a store full, and
// comes back to it only when there is nothing else.
func TestBatchSpillsOverWhenMembersFill(t *testing.T) {
	room := used(10*gib - 128*mib) // two chunks each
	rest := used(10*gib - 320*mib) // not so much emptier that the members count as hot
	req := request(store(1, member, room), store(2, member, room), store(3, member, room), store(4, rest), store(5, rest), store(6, rest))
	req.Count = 4
	plan, err := PlaceChunks(req)
	if err != nil {
		t.Fatal(err)
	}
	perStore := map[int]int{}
	for _, c := range plan.Chunks {
		for _, n := range numbers(c) {
			perStore[n]++
		}
	}
	if want := map[int]int{1: 2, 2: 2, 3: 2, 4: 2, 5: 2, 6: 2}; !reflect.DeepEqual(perStore, want) {
		t.Errorf("chunks per store %v, want %v", perStore, want)
	}
	req.Stores = req.Stores[:3] // nothing else: chunks are thin, so all four still go there
	if plan, err = PlaceChunks(req); err != nil || len(plan.Chunks) != 4 {
		t.Errorf("got %d chunks, %v", len(plan.Chunks), err)
	}
}

// Over many seeds, first chunks of new volumes fall on stores of equal fill in
// proportion to their free space, so equal ones share equally and nothing herds;
// one fuller than the others gets next to nothing, and an emptier one more, but
// not everything.
func TestLotsFollowFreeSpace(t *testing.T) {
	shares := func(stores ...Store) (out []float64) {
		req := request(stores...)
		req.Replicas = 1
		const n = 20000
		got := map[int]int{}
		for seed := range uint64(n) {
			req.Seed = seed
			plan, err := PlaceChunks(req)
			if err != nil {
				t.Fatal(err)
			}
			got[int(plan.Chunks[0][0][0])]++
		}
		for i := range stores {
			out = append(out, float64(got[i+1])/n)
		}
		return out
	}
	near := func(got, want float64) bool { return got > want-0.02 && got < want+0.02 }
	twice := func(s *Store) { s.CapacityBytes = 20 * gib }
	got := shares(store(1, used(5*gib)), store(2, used(5*gib)), store(3, twice, used(10*gib)), store(4, used(10*gib)))
	for i, want := range []float64{0.25, 0.25, 0.5, 0} {
		if !near(got[i], want) {
			t.Errorf("store %d of equal fill got %.3f of the chunks, want %.3f", i+1, got[i], want)
		}
	}
	got = shares(store(1, used(5*gib)), store(2, used(5*gib)), store(3, used(6*gib)), store(4, used(4*gib)))
	if got[2] > 0.02 || !near(got[0], got[1]) || got[3] < 0.5 || got[3] > 0.8 {
		t.Errorf("fills of 50, 50, 60 and 40 %% got %.3f of the chunks", got)
	}
}

func drawStores(t *rapid.T) []Store {
	var stores []Store
	for i := range rapid.IntRange(0, 12).Draw(t, "stores") {
		s := store(i+1, in(fmt.Sprintf("rack-%d", rapid.IntRange(1, 5).Draw(t, "rack"))))
		s.Up, s.Member, s.InSync = rapid.Bool().Draw(t, "up"), rapid.Bool().Draw(t, "member"), rapid.Bool().Draw(t, "in sync")
		s.CapacityBytes = uint64(rapid.IntRange(0, 20).Draw(t, "capacity")) * 64 * mib
		s.UsedBytes = uint64(rapid.IntRange(0, 22).Draw(t, "used")) * 64 * mib
		s.Slow = rapid.Bool().Draw(t, "slow")
		stores = append(stores, s)
	}
	return stores
}

// What must hold for any request: domains differ, nothing full, enough ready,
// nothing worse taken while something better of a free domain was left, and
// the answer depends on the request's content alone.
func TestChunkProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		req := request(drawStores(t)...)
		req.Seed = rapid.Uint64().Draw(t, "seed")
		req.Count = rapid.IntRange(1, 5).Draw(t, "count")
		req.Replicas = rapid.IntRange(1, 5).Draw(t, "replicas")
		req.MinReady = rapid.IntRange(0, req.Replicas).Draw(t, "min ready")
		req.PreferHost = fmt.Sprintf("host-%d", rapid.IntRange(0, 12).Draw(t, "prefer"))
		req.Slow = rapid.Bool().Draw(t, "cold")
		plan, err := PlaceChunks(req)

		again := req
		again.Stores = rapid.Permutation(req.Stores).Draw(t, "order")
		plan2, err2 := PlaceChunks(again)
		if fmt.Sprint(err) != fmt.Sprint(err2) || !reflect.DeepEqual(plan.Chunks, plan2.Chunks) {
			t.Fatalf("the order of stores changed the answer: %v %v, %v %v", plan.Chunks, err, plan2.Chunks, err2)
		}

		byID, readyDomains, roomyDomains := map[ids.StoreID]Store{}, map[string]bool{}, map[string]bool{}
		ready := func(s Store) bool { return s.Up && (!s.Member || s.InSync) }
		for _, s := range req.Stores {
			byID[s.ID] = s
			if s.UsedBytes+req.ChunkBytes <= s.CapacityBytes {
				roomyDomains[s.Domain] = true
				if ready(s) {
					readyDomains[s.Domain] = true
				}
			}
		}
		want := req.MinReady
		if want == 0 {
			want = req.Replicas
		}
		possible := len(roomyDomains) >= req.Replicas && len(readyDomains) >= want
		if (err == nil) != possible {
			t.Fatalf("possible %v, got %v", possible, err)
		}
		if err != nil {
			return
		}
		if len(plan.Chunks) != req.Count {
			t.Fatalf("%d chunks of %d", len(plan.Chunks), req.Count)
		}
		for _, c := range plan.Chunks {
			domains, readyCount := map[string]bool{}, 0
			for _, id := range c {
				s := byID[id]
				if s.UsedBytes+req.ChunkBytes > s.CapacityBytes {
					t.Fatalf("full store %v was chosen", s)
				}
				if ready(s) {
					readyCount++
				}
				domains[s.Domain] = true
			}
			if len(c) != req.Replicas || len(domains) != len(c) {
				t.Fatalf("chunk %v is on %d domains", numbers(c), len(domains))
			}
			if req.Count == 1 {
				mostWanted(t, req, c, ready)
			}
			if readyCount != min(req.Replicas, len(readyDomains)) {
				t.Fatalf("%d replicas are ready, could be %d", readyCount, min(req.Replicas, len(readyDomains)))
			}
			// A store that is hot loses every preference, the writer's too.
			if local, ok := prefer(req); ok && ready(local) && !hot(local, meanFill(req.Stores, local.Slow)) && req.Count == 1 && tierOf(req, local, mixed(req.Stores)) == Wanted && local.UsedBytes+req.ChunkBytes <= local.CapacityBytes && c[0] != local.ID {
				t.Fatalf("the writer's store is not first in %v", numbers(c))
			}
		}
	})
}

// mostWanted fails where a copy lies on a store that is ready but not of the wanted
// kind, or nearly full, and one that is both was left in the same domain or in one
// that was not taken.
func mostWanted(t *rapid.T, req ChunkRequest, chosen []ids.StoreID, ready func(Store) bool) {
	both, at := mixed(req.Stores), map[string]Store{}
	for _, s := range req.Stores {
		if slices.Contains(chosen, s.ID) {
			at[s.Domain] = s
		}
	}
	for _, better := range req.Stores {
		if !ready(better) || better.UsedBytes+req.ChunkBytes > better.CapacityBytes || slices.Contains(chosen, better.ID) {
			continue
		}
		for domain, s := range at {
			_, taken := at[better.Domain]
			if ready(s) && (!taken || better.Domain == domain) && tierOf(req, better, both) < tierOf(req, s, both) {
				t.Fatalf("%v was chosen, and %v was left", s, better)
			}
		}
	}
}

func prefer(req ChunkRequest) (Store, bool) {
	for _, s := range req.Stores {
		if s.Host == req.PreferHost {
			return s, true
		}
	}
	return Store{}, false
}

func TestExplainChunks(t *testing.T) {
	req := request(store(1, member), store(2, member, used(9*gib)), store(3, behind), store(4), store(5, down), store(6, full), store(7, member, down))
	req.PreferHost, req.Count = "host-4", 2
	plan, err := PlaceChunks(req)
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "chunks.golden", plan.Explain())
}

// golden compares with a file of testdata; -update rewrites it.
func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s differs; -update rewrites it\ngot:\n%s\nwant:\n%s", file, got, want)
	}
}
