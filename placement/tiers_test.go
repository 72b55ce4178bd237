package placement

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cairnstore/cairn/proto/ids"
)

const minute = int64(time.Minute / time.Millisecond)

var terms = Tiers{Prices: DefaultPrices, HeatMs: 866_000, CoolMs: 60 * minute, Above: 0.7}

// shelf is hosts with a fast store of so many chunks' room and a slow one of four
// times as much.
func shelf(hosts, room int) (stores []Store) {
	for i := range hosts {
		h := fmt.Sprintf("host-%d", i)
		stores = append(stores, Store{ID: ids.StoreID{1, byte(i)}, Host: h, Up: true, CapacityBytes: uint64(room) * 64 * mib},
			Store{ID: ids.StoreID{2, byte(i)}, Host: h, Up: true, Slow: true, CapacityBytes: 4 * uint64(room) * 64 * mib})
	}
	return stores
}

func fast(host int) ids.StoreID { return ids.StoreID{1, byte(host)} }
func slow(host int) ids.StoreID { return ids.StoreID{2, byte(host)} }

// kept is a chunk with copies, the first of which its reader has.
func kept(idleMs int64, read float64, stores ...ids.StoreID) Kept {
	return Kept{Placed: Placed{Bytes: 64 * mib, Stores: stores, Keep: stores[0]}, Heat: Heat{Read: read}, IdleMs: idleMs}
}

func TestChunksChangeTheirStoreClass(t *testing.T) {
	stores := func(change ...func([]Store)) []Store {
		s := shelf(3, 10)
		for i := range 3 {
			s[2*i].UsedBytes = 8 * 64 * mib // a chunk above the level
		}
		for _, f := range change {
			f(s)
		}
		return s
	}
	roomy := func(s []Store) { s[0].UsedBytes, s[2].UsedBytes, s[4].UsedBytes = 0, 0, 0 }
	for name, c := range map[string]struct {
		stores []Store
		chunk  Kept
		want   string // from, to; "": stays
	}{
		"idle":                             {stores(), kept(60*minute, 0, fast(0)), "1 0 → 2 0"},
		"idle, a copy on each host":        {stores(), kept(90*minute, 0, fast(0), fast(1)), "1 0 → 2 0"},
		"idle for less":                    {stores(), kept(59*minute, 0, fast(0)), ""},
		"not known":                        {stores(), kept(-1, 0, fast(0)), ""},
		"idle, and yet hot":                {stores(), kept(60*minute, 16*mib, fast(0)), ""},
		"idle, the level is not reached":   {stores(roomy), kept(60*minute, 0, fast(0)), ""},
		"idle, no slow store here":         {stores(func(s []Store) { s[1].Up = false }), kept(60*minute, 0, fast(0)), "1 0 → 2 1"},
		"idle, where it could go it is":    {stores(func(s []Store) { s[1].Up = false }), kept(60*minute, 0, fast(0), slow(1), slow(2)), ""},
		"idle, the slow store is full":     {stores(func(s []Store) { s[1].UsedBytes = s[1].CapacityBytes * 9 / 10 }), kept(60*minute, 0, fast(0)), "1 0 → 2 1"},
		"warm":                             {stores(roomy), kept(0, 40*mib, slow(0)), "2 0 → 1 0"},
		"warm, and the level is reached":   {stores(func(s []Store) { s[0].UsedBytes = 7 * 64 * mib }), kept(0, 40*mib, slow(0)), "2 0 → 1 0"},
		"warm, and there is no room":       {stores(), kept(0, 40*mib, slow(0)), ""},
		"lukewarm":                         {stores(roomy), kept(0, 30*mib, slow(0)), ""},
		"warm once, idle now":              {stores(roomy), kept(60*minute, 40*mib, slow(0)), ""},
		"read elsewhere":                   {stores(roomy), kept(0, 40*mib, fast(1), slow(0)), ""},
		"written":                          {stores(roomy), Kept{Placed: Placed{Bytes: 64 * mib, Stores: []ids.StoreID{fast(1), slow(0)}, Keep: fast(1)}, Heat: Heat{Write: 40 * mib}}, "2 0 → 1 0"},
		"read here, the fast one is down":  {stores(roomy, func(s []Store) { s[0].Up = false }), kept(0, 40*mib, slow(0)), ""},
		"written, the fast one is down":    {stores(roomy, func(s []Store) { s[0].Up = false }), Kept{Placed: Placed{Bytes: 64 * mib, Stores: []ids.StoreID{fast(1), slow(0)}, Keep: fast(1)}, Heat: Heat{Write: 40 * mib}}, "2 0 → 1 2"},
		"warm, another copy's store is no": {stores(roomy, func(s []Store) { s[0].Up = false }), Kept{Placed: Placed{Bytes: 64 * mib, Stores: []ids.StoreID{{9}, slow(0)}}, Heat: Heat{Write: 40 * mib}}, ""},
	} {
		got := ""
		for _, m := range PlanTiers(c.stores, []Kept{c.chunk}, terms, 1<<40) {
			got += fmt.Sprintf("%d %d → %d %d", m.From[0], m.From[1], m.To[0], m.To[1])
			if m.Why == "" || m.Price != 64*mib || m.Step == Warm && m.Stay <= m.Price {
				t.Errorf("%s: unexplained: %+v", name, m)
			}
		}
		if got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
	many := []Kept{kept(60*minute, 0, fast(0)), kept(70*minute, 0, fast(0)), kept(80*minute, 0, fast(0))}
	if m := PlanTiers(stores(), many, terms, 1<<40); len(m) != 1 || m[0].Chunk != 2 || !strings.Contains(m[0].Why, "1h20m0s") {
		t.Errorf("a store one chunk above the level lets go %+v", m)
	}
	if m := PlanTiers(stores(), many, terms, 64*mib-1); m != nil {
		t.Errorf("moved beyond the budget: %+v", m)
	}
	never := terms
	never.CoolMs = -1
	if m := PlanTiers(stores(), many, never, 1<<40); m != nil {
		t.Errorf("moved against the setting: %+v", m)
	}
	if m := PlanTiers([]Store{stores()[0], stores()[2]}, many, terms, 1<<40); m != nil {
		t.Errorf("moved to no slow store: %+v", m)
	}
}

// One copy's moves, for the property below.
type trail struct {
	step    Step
	traffic float64 // of its chunk by then
}

// Twelve virtual hours of chunks that become hot and cold at random, planned every
// minute: copies never share a host; nothing that is used is cooled; a copy comes
// back only for traffic that came since it went; and the last hours, in which
// nobody uses anything, end in rest below the level.
func TestClassesDoNotPingPong(t *testing.T) {
	for seed := range uint64(8) {
		rng := rand.New(rand.NewPCG(seed, 2))
		const hosts, count = 5, 120
		stores, rate, total := shelf(hosts, 60), make([]float64, count), make([]float64, count)
		chunks, used := make([]Kept, count), make([]int64, count)
		at := map[ids.StoreID]*Store{}
		for i := range stores {
			at[stores[i].ID] = &stores[i]
		}
		for i := range chunks {
			a := rng.IntN(hosts)
			chunks[i] = kept(0, 0, fast(a), fast((a+1+rng.IntN(hosts-1))%hosts))
			for _, id := range chunks[i].Stores {
				at[id].UsedBytes += chunks[i].Bytes
			}
		}
		trails, moves, late := map[string]*trail{}, map[Step]int{}, 0
		for now := int64(0); now < 15*60*minute; now += minute {
			for i := range chunks {
				c := &chunks[i]
				if rng.IntN(90) == 0 { // another mood
					rate[i] = []float64{0, 0, 0, 4096, mib, 8 * mib}[rng.IntN(6)] * rng.Float64()
				}
				c.Heat = c.Decay(time.Minute)
				if now < 12*60*minute && rate[i] > 0 {
					write := rate[i] * float64(rng.IntN(2))
					c.Read, c.Write, total[i], used[i] = c.Read+rate[i]-write, c.Write+write, total[i]+rate[i], now
				}
				c.IdleMs = now - used[i]
			}
			for _, m := range PlanTiers(stores, chunks, terms, 8*64*mib) {
				c, from, to := &chunks[m.Chunk], at[m.From], at[m.To]
				n := slices.Index(c.Stores, m.From)
				if c.Stores[n] = m.To; c.Keep == m.From {
					c.Keep = m.To
				}
				from.UsedBytes, to.UsedBytes = from.UsedBytes-c.Bytes, to.UsedBytes+c.Bytes
				if at[c.Stores[0]].Host == at[c.Stores[1]].Host || to.Slow != (m.Step == Cool) {
					t.Fatalf("seed %d: %s brings a chunk to %v", seed, m.Step, c.Stores)
				}
				key := fmt.Sprint(m.Chunk, n)
				last := trails[key]
				switch {
				case last != nil && last.step == m.Step:
					t.Fatalf("seed %d: a copy is moved by %s twice", seed, m.Step)
				case m.Step == Cool && c.IdleMs < terms.CoolMs:
					t.Fatalf("seed %d: a chunk is cooled that was used %d minutes ago", seed, c.IdleMs/minute)
				case m.Step == Warm && (last == nil || total[m.Chunk]-last.traffic < 1.5*float64(c.Bytes)*float64(terms.HeatMs)/float64(terms.HorizonMs)):
					t.Fatalf("seed %d: a copy comes back without new traffic", seed)
				}
				trails[key] = &trail{m.Step, total[m.Chunk]}
				moves[m.Step]++
				if now > 14*60*minute {
					late++
				}
			}
		}
		if moves[Cool] == 0 || moves[Warm] == 0 || late > 0 {
			t.Errorf("seed %d: %v moves, %d of them when nothing had been used for two hours", seed, moves, late)
		}
		for _, s := range stores {
			if !s.Slow && fillOf(s) > terms.Above {
				t.Errorf("seed %d: in the end %s is %.2f full", seed, s.Host, fillOf(s))
			}
		}
		t.Logf("seed %d: %v", seed, moves)
	}
}
