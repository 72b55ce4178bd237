package placement

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/cairnstore/cairn/proto/ids"
)

// plant is stores of three sizes, two on each host, five hosts a rack.
func plant(n int) []Store {
	var out []Store
	for i := range n {
		out = append(out, Store{ID: ids.StoreID{byte(i >> 8), byte(i), 1}, Host: fmt.Sprintf("h%d", i/2), Domain: fmt.Sprintf("r%d", i/10), Up: true,
			CapacityBytes: []uint64{1, 2, 4}[i%3] * 1024 * gib})
	}
	return out
}

// filled lets many volumes of many sizes grow in steps, with writers everywhere,
// until the plant is half full. Usage is seen late, as by heartbeats.
func filled(t *testing.T, stores []Store) (chunks []Placed, sets map[string]bool, volumes int) {
	t.Helper()
	rng := rand.New(rand.NewPCG(1, 2))
	used := make([]uint64, len(stores))
	at := map[ids.StoreID]int{}
	total, half := uint64(0), uint64(0)
	for i, s := range stores {
		at[s.ID], half = i, half+s.CapacityBytes/2
	}
	const chunk = 4 * gib // coarse, so that the test is quick: 1 TiB stores hold 256
	sets = map[string]bool{}
	for ; total < half; volumes++ {
		req := ChunkRequest{Replicas: 3, ChunkBytes: chunk, PreferHost: stores[rng.IntN(len(stores))].Host, MinReady: 1, Stores: slices.Clone(stores)}
		for range 1 + rng.IntN(3) { // it grows so often
			req.Seed, req.Count = rng.Uint64(), 1+rng.IntN(4)
			plan, err := PlaceChunks(req)
			if err != nil {
				t.Fatal(err)
			}
			for _, c := range plan.Chunks {
				chunks = append(chunks, Placed{Bytes: chunk, Stores: c})
				domains := map[string]bool{}
				for _, id := range c {
					i := at[id]
					used[i] += chunk
					total += chunk
					domains[stores[i].Domain] = true
					req.Stores[i].Member, req.Stores[i].InSync = true, true
				}
				if len(domains) != 3 {
					t.Fatalf("a chunk is in %d domains", len(domains))
				}
				sorted := slices.SortedFunc(slices.Values(c), func(a, b ids.StoreID) int { return slices.Compare(a[:], b[:]) })
				sets[fmt.Sprint(sorted)] = true
			}
		}
		if volumes%4 == 3 { // a heartbeat
			for i := range stores {
				stores[i].UsedBytes = used[i]
			}
		}
	}
	for i := range stores {
		stores[i].UsedBytes = used[i]
	}
	return chunks, sets, volumes
}

// The fullest store is within 5 % of the mean, by its size; a volume's chunks
// share their stores (few sets of replicas: two lost stores hit few volumes), and
// still a lost store is rebuilt from many.
func TestChunksAreSpreadEvenly(t *testing.T) {
	stores := plant(60)
	chunks, sets, volumes := filled(t, stores)
	mean, worst := meanFill(stores, false), 0.0
	for _, s := range stores {
		worst = max(worst, fillOf(s)/mean)
	}
	t.Logf("%d volumes, %d chunks, %d sets of replicas; fullest %.3f × mean", volumes, len(chunks), len(sets), worst)
	if worst > 1.05 {
		t.Errorf("the fullest store has %.3f × the mean", worst)
	}
	if len(sets) > 2*volumes {
		t.Errorf("%d sets of replicas for %d volumes", len(sets), volumes)
	}
	sources := map[ids.StoreID]bool{}
	for _, c := range chunks {
		if slices.Contains(c.Stores, stores[0].ID) {
			for _, id := range c.Stores {
				sources[id] = true
			}
		}
	}
	if len(sources) < len(stores)/3 {
		t.Errorf("a store is rebuilt from %d of %d others", len(sources)-1, len(stores)-1)
	}
}

// Adding a store moves no more than what it must hold, and a drained one exactly
// what it had; a second plan moves nothing.
func TestEvenMovesTheMinimum(t *testing.T) {
	stores := plant(60)
	chunks, _, _ := filled(t, stores)
	before := Even(stores, chunks, 0.05, 1<<20)
	if len(before) > len(chunks)/200 {
		t.Errorf("an even plant moves %d chunks", len(before))
	}
	stores = append(stores, Store{ID: ids.StoreID{9, 9, 9}, Host: "new", Domain: "rack-new", Up: true, CapacityBytes: 4096 * gib})
	moves := Even(stores, chunks, 0.01, 1<<20)
	mean := meanFill(stores, false)
	least := 0.0
	for _, s := range stores {
		least += max(0, float64(s.UsedBytes)-mean*1.01*float64(s.CapacityBytes))
	}
	moved := 0.0
	for _, m := range moves {
		moved += float64(chunks[m.Chunk].Bytes)
	}
	t.Logf("%d moves, %.0f GiB, the minimum is %.0f GiB", len(moves), moved/gib, least/gib)
	if moved > 1.1*least+float64(len(stores)*4*gib) || moved == 0 { // a chunk's rounding a store
		t.Errorf("it moves %.3f × the minimum", moved/least)
	}
	if got := Even(stores, chunks, 0.01, 3); len(got) != 3 || got[0] != moves[0] {
		t.Errorf("a bounded plan is %v", got)
	}
	apply(t, stores, chunks, moves)
	if again := Even(stores, chunks, 0.01, 1<<20); len(again) > len(moves)/50 {
		t.Errorf("a second plan moves %d", len(again))
	}
}

// apply carries a plan out and checks that domains stay apart.
func apply(t *testing.T, stores []Store, chunks []Placed, moves []ChunkMove) {
	t.Helper()
	at := map[ids.StoreID]int{}
	for i, s := range stores {
		at[s.ID] = i
	}
	for _, m := range moves {
		c := &chunks[m.Chunk]
		i := slices.Index(c.Stores, m.From)
		if i < 0 || slices.Contains(c.Stores, m.To) {
			t.Fatalf("move %v of a chunk on %v", m, c.Stores)
		}
		c.Stores = slices.Clone(c.Stores)
		c.Stores[i] = m.To
		stores[at[m.From]].UsedBytes -= c.Bytes
		stores[at[m.To]].UsedBytes += c.Bytes
		domains := map[string]bool{}
		for _, id := range c.Stores {
			domains[stores[at[id]].Domain] = true
		}
		if len(domains) != len(c.Stores) {
			t.Fatalf("move %v puts two replicas into one domain", m)
		}
	}
}
