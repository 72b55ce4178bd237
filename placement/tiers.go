package placement

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/cairnstore/cairn/proto/ids"
)

// Steps between fast and slow stores.
const (
	Cool Step = "cool" // an idle chunk's copy leaves a fast store that fills
	Warm Step = "warm" // a copy that is used comes back to a fast store
)

// Kept is a chunk as the choice between fast and slow stores sees it. The copy
// that Keep names serves the reads; all copies take the writes.
type Kept struct {
	Placed
	Heat
	IdleMs int64 // nobody has used it for so long; -1: not known
}

// Tiers are the terms of moves between fast and slow stores.
type Tiers struct {
	Prices
	HeatMs int64   // as in Case
	CoolMs int64   // a chunk goes when nobody has used it for so long; below 0: none goes
	Above  float64 // and leaves fast stores that are fuller than this; 0 < Above < 1
}

// TierMove is a copy's move to a store of the other kind.
type TierMove struct {
	ChunkMove
	Step Step
	// Stay is what a slow store reads and writes for the copy until the horizon,
	// in bytes, if it stays there; Price what the move carries.
	Stay, Price float64
	Why         string
}

// PlanTiers plans moves of at most bytesMax: copies that pay for it from slow to fast
// stores, and then the longest idle ones from fast stores that are too full. A
// copy stays on its host if it can, and its chunk's failure domains stay apart;
// each chunk moves once. Nothing ping-pongs: a copy that came to a fast store
// leaves it only after CoolMs without any use, and one that left comes back only
// when the traffic until the horizon is more than its size and what a step must
// save, more than twice what it may have left with.
func PlanTiers(stores []Store, chunks []Kept, t Tiers, bytesMax uint64) []TierMove {
	p := &tiering{Tiers: t, chunks: chunks, at: map[ids.StoreID]*Store{}, left: bytesMax, moved: make([]bool, len(chunks))}
	p.stores = slices.Clone(stores)
	for i := range p.stores {
		s := &p.stores[i]
		if s.Domain == "" {
			s.Domain = s.Host
		}
		p.at[s.ID] = s
	}
	if mixed(p.stores) {
		p.warm()
		p.cool()
	}
	return p.moves
}

// tiering is one plan being made.
type tiering struct {
	Tiers
	chunks []Kept
	stores []Store // used as planned so far
	at     map[ids.StoreID]*Store
	left   uint64
	moved  []bool // by chunk
	moves  []TierMove
}

// copyOf is one copy of a chunk that may move.
type copyOf struct {
	chunk   int
	from    *Store
	traffic float64 // bytes until the horizon
}

// traffic is what a copy's store reads and writes until the horizon.
func (p *tiering) traffic(c *Kept, at ids.StoreID) float64 {
	bytes := c.Write
	if at == c.Keep || !slices.Contains(c.Stores, c.Keep) {
		bytes += c.Read
	}
	return bytes * float64(p.HorizonMs) / float64(max(p.HeatMs, 1))
}

// copies lists the copies on stores of a kind, of chunks that may move.
func (p *tiering) copies(slow bool, want func(c *Kept, traffic float64) bool) (out []copyOf) {
	for i := range p.chunks {
		c := &p.chunks[i]
		for _, id := range c.Stores {
			if s := p.at[id]; s != nil && s.Up && s.Slow == slow {
				if traffic := p.traffic(c, id); want(c, traffic) {
					out = append(out, copyOf{i, s, traffic})
				}
			}
		}
	}
	return out
}

// pays says whether a copy on a slow store is used enough to be worth its bytes.
func (p *tiering) pays(c *Kept, traffic float64) bool {
	saved := traffic - float64(c.Bytes)
	return saved >= p.MinBytes && saved >= p.Hysteresis*traffic
}

// roof is how full moves may make a fast store: half of what is above the level
// is kept for chunks to come.
func (p *tiering) roof() float64 { return (1 + p.Above) / 2 }

func (p *tiering) warm() {
	list := p.copies(true, func(c *Kept, traffic float64) bool {
		return c.IdleMs >= 0 && (p.CoolMs < 0 || c.IdleMs < p.CoolMs) && p.pays(c, traffic)
	})
	slices.SortStableFunc(list, func(a, b copyOf) int { return cmp.Compare(b.traffic, a.traffic) })
	for _, x := range list {
		read := p.chunks[x.chunk].Keep == x.from.ID
		if to := p.target(x, p.roof(), read); to != nil {
			p.move(x, to, Warm, fmt.Sprintf("a slow store reads and writes it: %s in the next %v", Bytes(uint64(x.traffic)), time.Duration(p.HorizonMs)*time.Millisecond))
		}
	}
}

func (p *tiering) cool() {
	if p.CoolMs < 0 {
		return
	}
	list := p.copies(false, func(c *Kept, traffic float64) bool { return c.IdleMs >= p.CoolMs && traffic <= float64(c.Bytes)/2 })
	slices.SortStableFunc(list, func(a, b copyOf) int {
		return cmp.Or(cmp.Compare(p.chunks[b.chunk].IdleMs, p.chunks[a.chunk].IdleMs), cmp.Compare(a.traffic, b.traffic))
	})
	for _, x := range list {
		if fillOf(*x.from) <= p.Above {
			continue
		}
		if to := p.target(x, brimAt, false); to != nil {
			idle := time.Duration(p.chunks[x.chunk].IdleMs) * time.Millisecond
			p.move(x, to, Cool, fmt.Sprintf("nobody has used it for %v, and its fast store is %.0f %% full", idle.Truncate(time.Second), 100*fillOf(*x.from)))
		}
	}
}

// target finds the store of the other kind for a copy: on its own host, or else,
// unless it is to stay there, where its chunk's domains stay apart; the emptiest.
func (p *tiering) target(x copyOf, roof float64, stays bool) (best *Store) {
	c := &p.chunks[x.chunk]
	if p.moved[x.chunk] || c.Bytes > p.left {
		return nil
	}
	for i := range p.stores {
		s := &p.stores[i]
		home := s.Host == x.from.Host
		switch {
		case !s.Up || s.Slow == x.from.Slow || stays && !home || float64(s.UsedBytes+c.Bytes) > roof*float64(s.CapacityBytes):
			continue
		case p.shares(c, x.from, s):
			continue
		case best == nil, home && best.Host != x.from.Host, home == (best.Host == x.from.Host) && fillOf(*s) < fillOf(*best):
			best = s
		}
	}
	return best
}

// shares reports whether a store is in the failure domain of another copy, or
// might be.
func (p *tiering) shares(c *Kept, from, to *Store) bool {
	return slices.ContainsFunc(c.Stores, func(id ids.StoreID) bool {
		s := p.at[id]
		return id != from.ID && (s == nil || s.Domain == to.Domain)
	})
}

func (p *tiering) move(x copyOf, to *Store, step Step, why string) {
	bytes := p.chunks[x.chunk].Bytes
	m := TierMove{ChunkMove: ChunkMove{x.chunk, x.from.ID, to.ID}, Step: step, Price: float64(bytes), Why: why}
	if step == Warm {
		m.Stay = x.traffic
	}
	x.from.UsedBytes -= min(x.from.UsedBytes, bytes)
	to.UsedBytes += bytes
	p.left -= bytes
	p.moved[x.chunk] = true
	p.moves = append(p.moves, m)
}
