package server

import (
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/cairnstore/cairn/meta/state"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// Rebalancing: the leader plans now and then, inside a budget, and hands what it
// wants of data to the volumes' writers with the answers to their heartbeats: a
// copy moves by the writer's own means (chunk/volume), or by a maintenance
// session where nobody has the volume. Nothing of it is in the state: a new
// leader plans anew from the chunks as they are.

const (
	rebalanceEvery = 5 * time.Second
	defaultBytes   = 1 << 30          // of chunks on their way
	wishKeep       = 5 * time.Minute  // a wish nobody fulfils is forgotten
	wishRest       = 10 * time.Second // after a copy has left, until heartbeats show it
	sampleVolumes  = 64               // looked at in one plan
)

// moves is what placement wants of data now. It is a leader's memory.
type moves struct {
	mu    sync.Mutex // guards the fields below
	by    map[uint64][]*moving
	after uint64 // the volume sampled last
}

// moving is one copy on its way.
type moving struct {
	wish  *pb.ChunkWish
	bytes uint64
	since time.Duration
	there bool          // it counts
	left  time.Duration // when the old copy's space was seen free; 0: not yet
}

// wanted reports whether a volume has a copy to be moved.
func (m *moves) wanted(volume uint64) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.ContainsFunc(m.by[volume], func(x *moving) bool { return !x.there })
}

// tell returns what is wanted of volumes that a host holds or is asked to repair.
func (m *moves) tell(kv state.KV, held map[uint64]bool, repair []string) (out []*pb.VolumeWishes) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.by) == 0 {
		return nil
	}
	asked := map[uint64]bool{}
	for _, name := range repair {
		asked[state.VolumeByName(kv, name).GetId()] = true
	}
	for id, list := range m.by {
		if !held[id] && !asked[id] {
			continue
		}
		w := &pb.VolumeWishes{VolumeId: id}
		for _, x := range list {
			if !x.there {
				w.Wishes = append(w.Wishes, x.wish)
			}
		}
		if len(w.Wishes) > 0 {
			out = append(out, w)
		}
	}
	return out
}

// settle compares with the chunks as they are, forgets what is over, and returns
// the bytes still on their way.
func (m *moves) settle(kv state.KV, now time.Duration) (bytes uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for id, list := range m.by {
		list = slices.DeleteFunc(list, func(x *moving) bool { return x.over(kv, id, now) })
		m.by[id] = list
		if len(list) == 0 {
			delete(m.by, id)
		}
		for _, x := range list {
			if !x.there {
				bytes += x.bytes
			}
		}
	}
	return bytes
}

func (x *moving) over(kv state.KV, volume uint64, now time.Duration) bool {
	c := state.ChunkAt(kv, volume, x.wish.Index)
	if c == nil {
		return true
	}
	has := func(id []byte) bool {
		return slices.ContainsFunc(c.Stores, func(b []byte) bool { return string(b) == string(id) })
	}
	x.there = has(x.wish.To)
	switch {
	case !x.there:
		filling := slices.ContainsFunc(c.Filling, func(f *pb.Filling) bool { return string(f.Store) == string(x.wish.To) })
		return !has(x.wish.From) || !filling && now > x.since+wishKeep
	case state.HasWaste(kv, x.wish.From, volume, c.Id):
		return false
	case x.left == 0:
		x.left = now
	}
	return now > x.left+wishRest
}

// add begins moves.
func (m *moves) add(volume uint64, wishes []*pb.ChunkWish, chunkBytes uint64, now time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.by == nil {
		m.by = map[uint64][]*moving{}
	}
	for _, w := range wishes {
		if !slices.ContainsFunc(m.by[volume], func(x *moving) bool { return x.wish.Index == w.Index }) {
			m.by[volume] = append(m.by[volume], &moving{wish: w, bytes: chunkBytes, since: now})
		}
	}
}

// used corrects what stores report by what is on its way.
func (m *moves) used(stores []StoreView) {
	at := map[string]*StoreView{}
	for i := range stores {
		at[string(stores[i].ID[:])] = &stores[i]
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, list := range m.by {
		for _, x := range list {
			if s := at[string(x.wish.From)]; s != nil {
				s.UsedBytes -= min(s.UsedBytes, x.bytes)
			}
			if s := at[string(x.wish.To)]; s != nil && !x.there {
				s.UsedBytes += x.bytes
			}
		}
	}
}

// sample returns the next volumes, those with a copy on its way left out.
func (m *moves) sample(kv state.KV) (out []VolumeView) {
	m.mu.Lock()
	defer m.mu.Unlock()
	vs := state.VolumesAfter(kv, m.after, sampleVolumes)
	m.after = 0
	if len(vs) == sampleVolumes {
		m.after = vs[len(vs)-1].Id
	}
	for _, v := range vs {
		if v.DeletedUnixNs > 0 || len(m.by[v.Id]) > 0 {
			continue
		}
		at := map[string]string{}
		for _, mb := range state.Leaving(kv, v).Members {
			if mb.InSync && !mb.Leaving {
				at[string(mb.Store)] = mb.Host
			}
		}
		view := VolumeView{ID: v.Id, Name: v.Name, Domain: v.Domain}
		if !v.Maintenance {
			view.Home = v.HolderHost
		}
		for _, c := range state.Chunks(kv, v.Id) {
			view.Chunks = append(view.Chunks, chunkView(v, c, at))
		}
		out = append(out, view)
	}
	return out
}

// wide is a picture with the stores in it.
func (t *tenure) wide(kv state.KV, now time.Duration) *Picture {
	p := t.picture(kv, now, nil)
	p.Hot = func(vm *pb.VM) bool {
		for _, name := range append([]string{vm.Volume}, vm.Disks...) {
			if v := state.VolumeByName(kv, name); v != nil && t.heatOf(v.Id, now) != nil {
				return true
			}
		}
		return false
	}
	p.Stores = slices.DeleteFunc(t.storeViews(kv, &pb.Volume{}, now), func(s StoreView) bool { return s.Drained })
	t.moves.used(p.Stores)
	t.sweepUses(kv, now)
	p.Sample = func() []VolumeView {
		vs := t.moves.sample(kv)
		for _, v := range vs {
			t.warmth(&v, now)
		}
		return vs
	}
	return p
}

// rebalanceLoop plans and begins moves while this node leads.
func (s *Server) rebalanceLoop() {
	tick := time.NewTicker(rebalanceEvery)
	defer tick.Stop()
	c := &scheduler{s: s}
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-tick.C:
		}
		if !s.leads() {
			continue
		}
		t, err := s.lead()
		if err != nil {
			continue // not the leader any more, or not yet ready
		}
		if _, err := c.rebalance(t, &pb.PlaceQuestion{Rebalance: true, CarryOut: true}, false); err != nil && s.ctx.Err() == nil {
			s.log.Warn("rebalancing does not go on", "err", err)
		}
	}
}

// rebalance plans inside what is left of the budget, and begins it if asked to.
// By itself it does what the setting allows.
func (c *scheduler) rebalance(t *tenure, q *pb.PlaceQuestion, person bool) (ans *pb.PlaceAnswer, err error) {
	now := boottime()
	names := map[uint64]*pb.Volume{}
	rerr := c.s.fsm.read(func(kv state.KV) {
		set := state.PlacementOf(kv)
		if (set.Rebalance == "" || set.Rebalance == "off") && !person {
			return
		}
		limit := set.BytesAtOnce
		if limit == 0 {
			limit = defaultBytes
		}
		if q.BytesMax > 0 {
			limit = q.BytesMax
		}
		q.BytesMax = limit - min(limit, t.moves.settle(kv, now))
		if !person {
			q.MovesMax = uint32(max(0, t.movesLeft(kv)))
			q.NoVms = set.Rebalance != "all" || q.MovesMax == 0
		}
		if ans, err = c.s.cfg.Placer.Answer(t.wide(kv, now), q); err != nil {
			return
		}
		for _, m := range ans.Moves {
			if v := state.VolumeByName(kv, m.Volume); m.Chunk != nil && v != nil {
				names[v.Id] = v
			}
		}
	})
	if err == nil {
		err = rerr
	}
	if err != nil || ans == nil || !q.CarryOut {
		return ans, err
	}
	return ans, c.carryOut(t, ans.Moves, names, now)
}

// carryOut begins planned moves, and puts them into the event log.
func (c *scheduler) carryOut(t *tenure, plan []*pb.PlaceMove, volumes map[uint64]*pb.Volume, now time.Duration) error {
	for id, v := range volumes {
		var wishes []*pb.ChunkWish
		count, why := map[string]int{}, map[string]string{} // by step and way; the first one's reason stands for all
		for _, m := range plan {
			if m.Chunk != nil && m.Volume == v.Name {
				wishes = append(wishes, m.Chunk)
				way := fmt.Sprintf("(%s) from host %s to host %s", m.Step, m.From, m.To)
				if count[way]++; count[way] == 1 {
					why[way] = m.Chunk.Why
				}
			}
		}
		t.moves.add(id, wishes, v.ChunkBytes, now)
		for way, n := range count {
			note := &pb.Note{What: fmt.Sprintf("placement moves %d chunks of volume %s %s: %s", n, v.Name, way, why[way])}
			if _, err := c.do(t, &pb.Command{Op: &pb.Command_Note{Note: note}}); err != nil {
				return err
			}
		}
	}
	var binds []*pb.BindVM
	err := c.s.fsm.read(func(kv state.KV) {
		for _, m := range plan {
			vm := state.VMByName(kv, m.Vm)
			if m.Chunk != nil || vm == nil || vm.Host != m.From || vm.Desired != "running" || vm.GetQueue().GetStep() != "" {
				continue // it has changed and is left alone
			}
			binds = append(binds, &pb.BindVM{Vm: vm.Name, Revision: vm.Revision, Host: vm.Host, Desired: "running", Queue: &pb.VMQueue{Step: state.StepEvicting, NextHost: m.To,
				Reason: fmt.Sprintf("goes to host %s, where %+.0f %% of its traffic is local", m.To, 100*m.Gain)}})
		}
	})
	if err != nil {
		return err
	}
	return c.bindAll(t, binds)
}

// askRebalance answers a person.
func (s *Server) askRebalance(t *tenure, q *pb.PlaceQuestion) (*pb.PlaceAnswer, error) {
	ans, err := (&scheduler{s: s}).rebalance(t, q, true)
	if err == nil && ans == nil {
		err = status.Errorf(status.Internal, "the placer planned nothing, not even nothing to do")
	}
	return ans, err
}
