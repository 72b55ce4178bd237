package driver

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/cairnstore/cairn/meta/server"
	"github.com/cairnstore/cairn/placement"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
)

const chunk = 64 << 20

func storeOf(host int) (id ids.StoreID) { id[0] = byte(host + 1); return id }

// yard is a cluster whose moves happen at once: each host has one store, chunks
// have copies, and one VM per volume.
type yard struct {
	p      *server.Picture
	chunks [][]server.ChunkView // by VM
}

func newYard(hosts int, storeBytes uint64) *yard {
	y := &yard{p: cluster(hosts)}
	for i := range hosts {
		y.p.Stores = append(y.p.Stores, server.StoreView{ID: storeOf(i), Host: y.p.Hosts[i].Name, Up: true, CapacityBytes: storeBytes})
	}
	y.p.Chunks = func(vm *pb.VM) []server.ChunkView {
		for i, v := range y.p.VMs {
			if v == vm {
				return y.chunks[i]
			}
		}
		return nil
	}
	y.p.Sample = func() (out []server.VolumeView) {
		for i, cs := range y.chunks {
			out = append(out, server.VolumeView{ID: uint64(i + 1), Name: fmt.Sprintf("v%d", i), Domain: "host", Home: y.p.VMs[i].Host, Chunks: cs})
		}
		return out
	}
	return y
}

// put adds a VM on a host with chunks on the stores of others.
func (y *yard) put(host, chunks int, heat float64, on ...int) {
	n := len(y.p.VMs)
	y.p.VMs = append(y.p.VMs, vm(fmt.Sprintf("vm%d", n), 1, y.p.Hosts[host].Name))
	var cs []server.ChunkView
	for i := range chunks {
		c := server.ChunkView{Volume: uint64(n + 1), Name: fmt.Sprintf("v%d", n), Index: uint32(i), Domain: "host", Bytes: chunk, Read: heat, Settled: true}
		for _, h := range on {
			c.Hosts, c.Stores = append(c.Hosts, y.p.Hosts[h].Name), append(c.Stores, storeOf(h))
			y.p.Stores[h].UsedBytes += chunk
		}
		cs = append(cs, c)
	}
	y.chunks = append(y.chunks, cs)
}

// turn plans and does it; it returns how many moves there were.
func (y *yard) turn(t *testing.T, q *pb.PlaceQuestion) int {
	t.Helper()
	q.Rebalance = true
	ans, err := New().Answer(y.p, q)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range ans.Moves {
		if m.Chunk == nil {
			for _, v := range y.p.VMs {
				if v.Name == m.Vm {
					v.Host = m.To
				}
			}
			continue
		}
		y.move(t, m)
	}
	return len(ans.Moves)
}

func (y *yard) move(t *testing.T, m *pb.PlaceMove) {
	t.Helper()
	var vol int
	if _, err := fmt.Sscanf(m.Volume, "v%d", &vol); err != nil {
		t.Fatalf("move of volume %q", m.Volume)
	}
	c := &y.chunks[vol][m.Chunk.Index]
	done := false
	for i, id := range c.Stores {
		if string(id[:]) == string(m.Chunk.To) {
			t.Fatalf("chunk %d of volume %d goes where it is", m.Chunk.Index, vol)
		}
		if string(id[:]) == string(m.Chunk.From) {
			for h := range y.p.Stores {
				if st := &y.p.Stores[h]; string(st.ID[:]) == string(m.Chunk.To) {
					c.Stores[i], c.Hosts[i] = st.ID, st.Host
					st.UsedBytes += chunk
				} else if st.ID == id {
					st.UsedBytes -= chunk
				}
			}
			done = true
		}
	}
	if !done {
		t.Fatalf("chunk %d of volume %d leaves where it is not", m.Chunk.Index, vol)
	}
}

// Hot chunks come to a VM whose move would cost more; cold ones stay.
func TestHotChunksComeToTheirVM(t *testing.T) {
	y := newYard(3, 100*gib)
	y.put(0, 4, 100*gib, 1, 2)
	y.p.VMs[0].MemoryBytes = 15 * gib // dear to move
	y.put(0, 4, 0, 1, 2)
	if n := y.turn(t, &pb.PlaceQuestion{}); n != 4 {
		t.Fatalf("%d moves, want the four hot chunks", n)
	}
	for _, c := range y.chunks[0] {
		if c.Hosts[0] != "h0" && c.Hosts[1] != "h0" {
			t.Errorf("chunk %d is on %v", c.Index, c.Hosts)
		}
	}
	if n := y.turn(t, &pb.PlaceQuestion{}); n != 0 {
		t.Errorf("then %d more", n)
	}
}

func TestBudgetOfBytesIsKept(t *testing.T) {
	y := newYard(3, 100*gib)
	y.put(0, 8, 100*gib, 1, 2)
	if n := y.turn(t, &pb.PlaceQuestion{NoVms: true, BytesMax: 3*chunk + 1}); n != 3 {
		t.Errorf("%d moves inside a budget of three chunks", n)
	}
}

// A store that came empty is filled from the others until it is as full as they
// are, and then nothing moves.
func TestANewStoreIsFilled(t *testing.T) {
	y := newYard(4, 100*gib)
	for i := range 12 {
		y.put(3, 100, 0, i%3, (i+1)%3)
	}
	total := 0
	for range 200 {
		n := y.turn(t, &pb.PlaceQuestion{NoVms: true})
		if total += n; n == 0 {
			break
		}
	}
	mean := uint64(2400 * chunk / 4)
	for _, s := range y.p.Stores {
		if s.UsedBytes > mean*110/100 || s.UsedBytes < mean*80/100 {
			t.Errorf("%s has %d chunks, the mean is %d", s.Host, s.UsedBytes/chunk, mean/chunk)
		}
	}
	if least := 2400 / 4; total > least*11/10 || total < least*8/10 {
		t.Errorf("%d moves, the least that evens out entirely is %d", total, least)
	}
}

// Ten virtual minutes of the loop, a plan every five seconds, with all it may do:
// nothing moves in the second half, nor in another ten minutes.
func TestTheLoopComesToRest(t *testing.T) {
	for seed := range uint64(10) {
		rng := rand.New(rand.NewPCG(seed, 1))
		y := newYard(8, 20*gib)
		for range 20 {
			a := rng.IntN(8)
			y.put(rng.IntN(8), 1+rng.IntN(40), float64(rng.IntN(3))*rng.Float64()*4*gib, a, (a+1+rng.IntN(7))%8)
		}
		for v := range y.p.VMs { // as many as fit
			y.p.VMs[v].Host = fmt.Sprintf("h%d", v%8)
		}
		var moved [240]int
		for i := range moved {
			moved[i] = y.turn(t, &pb.PlaceQuestion{MovesMax: 4})
		}
		first, late := 0, 0
		for i, n := range moved {
			if i < 60 {
				first += n
			} else {
				late += n
			}
		}
		if first == 0 || late != 0 {
			t.Errorf("seed %d: %d moves in the first five minutes, %d in the fifteen after", seed, first, late)
		}
	}
}

// The same loop with a slow store on every host too: what is used ends on fast
// stores and what nobody uses leaves those that are too full, copies of a chunk stay
// on different hosts, and then nothing moves. Evening out keeps to a class.
func TestTheLoopWithClassesComesToRest(t *testing.T) {
	for seed := range uint64(3) {
		rng := rand.New(rand.NewPCG(seed, 3))
		const hosts = 6
		y := newYard(hosts, 16*gib)
		for i := range hosts {
			id := storeOf(i)
			id[1] = 1
			y.p.Stores = append(y.p.Stores, server.StoreView{ID: id, Host: y.p.Hosts[i].Name, Up: true, Slow: true, CapacityBytes: 64 * gib})
		}
		for v := range 24 {
			a := rng.IntN(hosts)
			y.put(v%hosts, 10+rng.IntN(60), 0, a, (a+1+rng.IntN(hosts-1))%hosts)
			for i := range y.chunks[v] {
				c := &y.chunks[v][i]
				if rng.IntN(4) == 0 {
					c.Read = gib * rng.Float64()
				} else {
					c.IdleMs = 2 * defaultCoolMs
				}
				if rng.IntN(4) == 0 { // begins on slow stores
					for k, id := range c.Stores {
						h := int(id[0]) - 1
						c.Stores[k][1] = 1
						y.p.Stores[h].UsedBytes -= chunk
						y.p.Stores[hosts+h].UsedBytes += chunk
					}
				}
			}
		}
		first, late := 0, 0
		for i := range 240 {
			n := y.turn(t, &pb.PlaceQuestion{NoVms: true})
			if i < 120 {
				first += n
			} else {
				late += n
			}
		}
		if first == 0 || late != 0 {
			t.Errorf("seed %d: %d moves in the first ten minutes, %d in the ten after", seed, first, late)
		}
		cold := map[string]bool{} // hosts with an idle chunk on a fast store
		for v, cs := range y.chunks {
			for _, c := range cs {
				if c.Hosts[0] == c.Hosts[1] {
					t.Fatalf("seed %d: both copies of chunk %d of volume %d are on %s", seed, c.Index, v, c.Hosts[0])
				}
				for i, h := range c.Hosts {
					slow := c.Stores[i][1] == 1
					if h == y.p.VMs[v].Host && slow && c.Read > 100<<20 {
						t.Errorf("seed %d: a chunk that VM %d reads is on its host's slow store", seed, v)
					}
					cold[h] = cold[h] || !slow && c.IdleMs > 0
				}
			}
		}
		for _, s := range y.p.Stores {
			if !s.Slow && cold[s.Host] && fill(s) > defaultCoolPercent/100.0 {
				t.Errorf("seed %d: the fast store of %s is %.2f full, and has chunks nobody uses", seed, s.Host, fill(s))
			}
		}
	}
}

// A copy more on the VM's host is never cheaper than one that moves there: the
// step exists to show it, and no plan takes it.
func TestAddingACopyIsNeverCheaper(t *testing.T) {
	rng := rand.New(rand.NewPCG(7, 7))
	for range 20_000 {
		c := placement.Case{Host: 0, Target: -1, HeatMs: heatMs, FreeBytes: 1 << 50}
		for range 1 + rng.IntN(6) {
			ch := placement.ChunkHeat{Bytes: chunk, Heat: placement.Heat{Read: rng.Float64() * gib, Write: rng.Float64() * gib * float64(rng.IntN(2))}}
			for h := range 4 {
				if rng.IntN(2) == 0 {
					ch.Hosts = append(ch.Hosts, h)
				}
			}
			if len(ch.Hosts) > 0 {
				c.Chunks = append(c.Chunks, ch)
			}
		}
		if s := c.Choose(placement.DefaultPrices); s.Step == placement.AddReplica {
			t.Fatalf("chosen for %+v", c)
		}
	}
}
