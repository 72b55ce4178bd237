package server

import (
	"cmp"
	"fmt"
	"math"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/cairnstore/cairn/meta/state"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// The queue of VMs runs on the metadata leader: it has everybody's heartbeats
// and heat in memory and commits what it decides. Being deposed does no harm,
// nor would a second one: a bind is compare-and-set, checked at the commit.

const (
	scheduleEvery = 500 * time.Millisecond // and at once after a change
	turnMax       = 256                    // commands of one turn
)

// picture is the cluster for one call of the placer.
func (t *tenure) picture(kv state.KV, now time.Duration, except []string) *Picture {
	not := map[string]bool{}
	for _, h := range except {
		not[h] = true
	}
	p := &Picture{NowMs: time.Now().UnixMilli(), VMs: state.VMs(kv), Policy: state.PlacementOf(kv)}
	p.Chunks = func(vm *pb.VM) []ChunkView { return t.chunkViews(kv, vm, now) }
	for _, h := range t.hostStates(kv, now) {
		if !not[h.Host.Name] {
			p.Hosts = append(p.Hosts, HostView{Host: h.Host, Up: h.Up, FreeBytes: freeOn(h)})
		}
	}
	return p
}

func freeOn(h *pb.HostState) (sum uint64) {
	for _, s := range h.Stores {
		if s.Up && !s.Store.Retired {
			sum += s.Usage.GetCapacityBytes() - min(s.Usage.GetCapacityBytes(), s.Usage.GetLiveBytes())
		}
	}
	return sum
}

// chunkViews returns a VM's chunks with what is known of their heat.
func (t *tenure) chunkViews(kv state.KV, vm *pb.VM, now time.Duration) (out []ChunkView) {
	for _, name := range append([]string{vm.Volume}, vm.Disks...) {
		v := state.VolumeByName(kv, name)
		if v == nil {
			continue
		}
		at := map[string]string{}
		for _, m := range v.Members {
			if m.InSync {
				at[string(m.Store)] = m.Host
			}
		}
		heat := t.heatOf(v.Id, now)
		for _, c := range state.Chunks(kv, v.Id) {
			view := chunkView(v, c, at)
			view.Read, view.Write = float64(heat[c.Index].GetRead()), float64(heat[c.Index].GetWrite())
			out = append(out, view)
		}
	}
	return out
}

// chunkView translates a chunk; at is the host of each member in sync.
func chunkView(v *pb.Volume, c *pb.Chunk, at map[string]string) ChunkView {
	view := ChunkView{Volume: v.Id, Name: v.Name, Index: c.Index, Domain: v.Domain, Bytes: v.ChunkBytes, Settled: len(c.Filling) == 0}
	for _, b := range c.Stores {
		h := at[string(b)]
		id, err := ids.StoreIDFromBytes(b)
		if h == "" || err != nil {
			view.Settled = false
			continue
		}
		view.Hosts, view.Stores = append(view.Hosts, h), append(view.Stores, id)
	}
	return view
}

// volumeHeat is a volume's last report.
type volumeHeat struct {
	at     time.Duration
	chunks map[uint32]*pb.ChunkHeat
}

// Bounds of the heat a leader keeps.
const (
	heatChunksMax = 1024      // of one volume
	heatKeep      = time.Hour // after its volume's last report
	heatHalfLife  = 10 * time.Minute
)

// hearHeat keeps what gateways report; leases were checked by the caller.
func (t *tenure) hearHeat(reports []*pb.VolumeHeat, held map[uint64]bool, now time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.heat == nil {
		t.heat = map[uint64]*volumeHeat{}
	}
	for _, r := range reports {
		if !held[r.VolumeId] {
			continue
		}
		t.usesOf(r.VolumeId).hear(r, now)
		vh := &volumeHeat{at: now, chunks: map[uint32]*pb.ChunkHeat{}}
		for _, c := range r.Chunks[:min(len(r.Chunks), heatChunksMax)] {
			vh.chunks[c.Index] = c
		}
		t.heat[r.VolumeId] = vh
	}
	if now < t.heatSwept+heatKeep/4 {
		return
	}
	t.heatSwept = now
	for id, vh := range t.heat {
		if now > vh.at+heatKeep {
			delete(t.heat, id)
		}
	}
}

// heatOf returns a volume's heat by chunk index, decayed since its report.
func (t *tenure) heatOf(volume uint64, now time.Duration) map[uint32]*pb.ChunkHeat {
	t.mu.Lock()
	defer t.mu.Unlock()
	vh := t.heat[volume]
	if vh == nil {
		return nil
	}
	f := float32(math.Exp2(-float64(now-vh.at) / float64(heatHalfLife)))
	out := make(map[uint32]*pb.ChunkHeat, len(vh.chunks))
	for i, c := range vh.chunks {
		out[i] = &pb.ChunkHeat{Index: i, Read: c.Read * f, Write: c.Write * f}
	}
	return out
}

// placeVM asks the placer for a host.
func (s *Server) placeVM(t *tenure, q *pb.PlaceVM) (host, reason string, err error) {
	rerr := s.fsm.read(func(kv state.KV) {
		if state.VMByName(kv, q.Vm) == nil {
			err = status.Errorf(status.NotFound, "there is no VM %q: `cairn vm ls` lists them", q.Vm)
			return
		}
		host, reason, err = s.cfg.Placer.PlaceVM(t.picture(kv, boottime(), q.ExceptHosts), q.Vm)
	})
	if rerr != nil {
		return "", "", rerr
	}
	return host, reason, err
}

// answerPlace answers a person's question about placement.
func (s *Server) answerPlace(t *tenure, q *pb.PlaceQuestion) (ans *pb.PlaceAnswer, err error) {
	if q.Rebalance {
		return s.askRebalance(t, q)
	}
	rerr := s.fsm.read(func(kv state.KV) {
		if q.Settings {
			ans = &pb.PlaceAnswer{Settings: state.PlacementOf(kv)}
			return
		}
		ans, err = s.cfg.Placer.Answer(t.picture(kv, boottime(), nil), q)
	})
	if rerr != nil {
		return nil, rerr
	}
	return ans, err
}

// vmsToDo returns what a host has to do: VMs to start or stop, and its batch
// VMs when some wait for their turn, with the processors they share.
func vmsToDo(kv state.KV, host string) (out []*pb.VM, batchCPU uint64) {
	sliced := false
	for _, vm := range state.VMsUnderway(kv) {
		// Of one that is switched both hosts hear.
		if vm.GetQueue().GetStep() != "" && (vm.Host == host || vm.Queue.Step == state.StepSwitched && vm.Queue.NextHost == host) {
			out = append(out, vm)
		}
		sliced = sliced || vm.Host == host && vm.GetQueue().GetSliced()
	}
	if !sliced {
		return out, 0
	}
	used := uint64(0)
	for _, vm := range state.VMsOn(kv, host) {
		if vm.GetNeeds().GetBatch() && vm.GetQueue().GetStep() == "" && vm.Desired == "running" {
			out = append(out, vm)
		} else {
			used += state.Takes(vm)[0]
		}
	}
	limit := state.Limit(state.HostByName(kv, host))[0]
	return out, limit - min(limit, used)
}

// scheduler is the leader's own client: it has a session like any other, a new
// one in every tenure and after every unknown outcome.
type scheduler struct {
	s       *Server
	who     string // in the event log; "": the queue
	tenure  *tenure
	session string
	seq     uint64
	rescued time.Duration // the last look for hosts that are gone
	silent  string        // what was last said about them
}

// kickSchedule runs the queue now.
func (s *Server) kickSchedule() {
	select {
	case s.kick <- struct{}{}:
	default:
	}
}

func (s *Server) scheduleLoop() {
	tick := time.NewTicker(scheduleEvery)
	defer tick.Stop()
	c := &scheduler{s: s}
	last := ""
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-tick.C:
		case <-s.kick:
		}
		err := c.turn()
		if err == nil {
			last = ""
		} else if text := err.Error(); text != last && s.ctx.Err() == nil {
			last = text
			s.log.Warn("the queue of VMs does not go on", "err", err)
		}
	}
}

// turn plans and commits once. A bind that lost a race is planned anew in the
// next turn.
func (c *scheduler) turn() error {
	if !c.s.leads() {
		return nil
	}
	t, err := c.s.lead()
	if err != nil {
		return nil // not the leader any more, or not yet ready
	}
	if err := c.rescue(t); err != nil {
		return err
	}
	var binds []*pb.BindVM
	err = c.s.fsm.read(func(kv state.KV) {
		for _, vm := range state.VMsUnderway(kv) {
			if vm.GetQueue().GetStep() == state.StepQueued {
				binds = c.s.cfg.Placer.Turn(t.picture(kv, boottime(), nil))
				return
			}
		}
	})
	if err != nil {
		return err
	}
	return c.bindAll(t, binds)
}

// bindAll commits binds; those that lost a race are planned anew.
func (c *scheduler) bindAll(t *tenure, binds []*pb.BindVM) error {
	for _, b := range binds[:min(len(binds), turnMax)] {
		res, err := c.do(t, &pb.Command{Op: &pb.Command_BindVm{BindVm: b}})
		if err != nil {
			return err
		}
		if k := status.Kind(res.Status); k != status.OK && k != status.Conflict && k != status.NoSpace && k != status.NotFound {
			return status.Errorf(k, "binding VM %s to host %q: %s", b.Vm, b.Host, res.Detail)
		}
	}
	return nil
}

// do commits a command of the scheduler.
func (c *scheduler) do(t *tenure, cmd *pb.Command) (*pb.Result, error) {
	if c.session == "" || c.tenure != t {
		c.tenure, c.seq = t, 0
		c.session = fmt.Sprintf("queue-%s-%d-%s", c.s.cfg.ID, t.term, ids.NewStoreID().Short())
		if res, err := c.commit(&pb.Command{Op: &pb.Command_OpenSession{OpenSession: &pb.OpenSession{}}}); err != nil || res.Status != 0 {
			c.session = ""
			return res, err
		}
	}
	c.seq++
	cmd.Seq = c.seq
	res, err := c.commit(cmd)
	if err != nil || status.Kind(res.Status) == status.Expired {
		c.session = "" // the number may be used up or not: begin anew
	}
	return res, err
}

func (c *scheduler) commit(cmd *pb.Command) (*pb.Result, error) {
	if err := c.s.checkFree(cmd); err != nil {
		return nil, err
	}
	cmd.Session, cmd.Who, cmd.TimeUnixNs = c.session, cmp.Or(c.who, "the queue"), time.Now().UnixNano()
	b, err := proto.Marshal(cmd)
	if err != nil {
		return nil, status.Errorf(status.Invalid, "a metadata command that cannot be encoded: %w", err)
	}
	return c.s.commit(b)
}
