package volume

import (
	"time"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// The way of a deleted layer whose child still looks through it:
//
//  1. Every member is told which layers there are and that this one is merged.
//  2. Chunk by chunk, every member gives the layer's blocks to the child.
//  3. When all members have, for all chunks, metadata takes the layer away.
//     Until it is known whether it did, nothing else is merged: a layer that
//     may be gone already must not be given another one's blocks.
//
// Members may be at different places meanwhile: a chunk shows the same through
// its layers before, during and after. Only comparing them layer by layer would
// be confused: so this goes on only while all members are in sync, and a join
// copies from none that has a merge to answer. A seal ends what a store was
// merging, so attach finds them at rest too.

const (
	reclaimChunks = 2 // under way at a time
	reclaimRetry  = time.Second
	reclaimSick   = 30 * time.Second // after a bad block or a full store
)

// reclaim is the merging under way.
type reclaim struct {
	layer  ids.LayerID
	queue  []*chunk
	active int // chunks under way, ≤ reclaimChunks; or members being told
	told   bool
	call   *MetaCall
	asked  uint64        // revision of an earlier asking whose outcome is unknown; 0: none
	after  time.Duration // it is asked again
}

// quiet reports whether every member is in sync and serves.
func (e *Engine) quiet() bool {
	for _, r := range e.replicas {
		if !r.gone && (!r.readable() || r.join != nil) {
			return false
		}
	}
	for _, f := range e.moves.fills { // nor are copies compared meanwhile
		if f.phase != fillWait {
			return false
		}
	}
	return e.state == Serving && e.member.call == nil
}

// stepReclaim goes as far as it can.
func (e *Engine) stepReclaim() {
	rc := e.reclaim
	switch {
	case rc == nil:
		if e.now < e.reclaimAfter || !e.quiet() {
			return
		}
		if rc = e.nextReclaim(); rc == nil {
			return
		}
		e.reclaim = rc
		e.tellLayers(rc)
	case !e.quiet():
		if rc.call == nil && rc.asked == 0 { // else the answer decides
			e.endReclaim(reclaimRetry)
		}
	}
	e.mergeChunks()
}

// nextReclaim finds the oldest layer that can be merged.
func (e *Engine) nextReclaim() *reclaim {
	var best *pb.Layer
	for _, l := range e.layers.all {
		if l.State == pb.LayerState_LAYER_STATE_DELETED && ids.LayerID(l.Id) != e.layers.top && (best == nil || l.Id < best.Id) && len(e.childrenOf(l)) == 1 {
			best = l
		}
	}
	if best == nil {
		return nil
	}
	return &reclaim{layer: ids.LayerID(best.Id), queue: e.sortedChunks()}
}

func (e *Engine) childrenOf(p *pb.Layer) (out []*pb.Layer) {
	for _, l := range e.layers.all {
		if l.HasParent && l.Parent == p.Id {
			out = append(out, l)
		}
	}
	return out
}

// LayerEntries lists layers as a store is told of them (wire.Layers), by rising
// id.
func LayerEntries(v *pb.VolumeLayers) []wire.Entry {
	out := make([]wire.Entry, 0, len(v.Layers))
	for _, l := range v.Layers {
		en := wire.Entry{Layer: ids.LayerID(l.Id)}
		if l.Merging {
			en.Kind, en.Block = wire.EntryZero, ids.Block(l.Into)
		}
		out = append(out, en)
	}
	return out
}

// layerList is what stores are to know of the layers. Metadata lists them by
// rising id.
func (e *Engine) layerList() []wire.Entry {
	v := &pb.VolumeLayers{}
	for _, l := range e.layers.all {
		ref := &pb.LayerRef{Id: l.Id}
		if ch := e.childrenOf(l); l.State == pb.LayerState_LAYER_STATE_DELETED && len(ch) == 1 {
			ref.Merging, ref.Into = true, ch[0].Id
		}
		v.Layers = append(v.Layers, ref)
	}
	return LayerEntries(v)
}

// tellLayers tells every member, and then begins with the chunks.
func (e *Engine) tellLayers(rc *reclaim) {
	list := e.layerList()
	for _, r := range e.replicas {
		if r.gone {
			continue
		}
		rc.active++
		q := &wire.Request{Kind: wire.Layers, Layer: e.layers.last, Entries: list}
		e.call(r, q, func(rep *wire.Reply) {
			if e.reclaim != rc {
				return
			}
			if rep.Status != status.OK {
				e.reclaimFailed(r, rep)
				return
			}
			if rc.active--; rc.active == 0 {
				rc.told = true
				e.mergeChunks()
			}
		})
	}
	rc.told = rc.active == 0 // no members
}

// mergeChunks keeps reclaimChunks under way, and ends with the commit.
func (e *Engine) mergeChunks() {
	rc := e.reclaim
	for rc != nil && rc == e.reclaim && rc.told && rc.active < reclaimChunks && len(rc.queue) > 0 {
		c := rc.queue[0]
		rc.queue = rc.queue[1:]
		if c.id != 0 {
			e.mergeChunk(rc, c)
		}
	}
	if rc != nil && rc == e.reclaim && rc.told && rc.call == nil && e.now >= rc.after && rc.active == 0 && len(rc.queue) == 0 {
		rc.call = &MetaCall{Prune: &pb.PruneLayer{VolumeId: uint64(e.volume), Epoch: uint32(e.epoch), Revision: e.revision, Layer: uint32(rc.layer)}}
		e.out.Meta = append(e.out.Meta, rc.call)
	}
}

func (e *Engine) mergeChunk(rc *reclaim, c *chunk) {
	rc.active++
	left := c.count()
	for pos, r := range c.replicas {
		if r.index < 0 || c.fills[pos] != nil {
			continue
		}
		r.merging++
		e.call(r, &wire.Request{Kind: wire.Merge, Chunk: c.id, Layer: rc.layer}, func(rep *wire.Reply) {
			r.merging--
			if e.reclaim != rc {
				return
			}
			if rep.Status != status.OK {
				e.reclaimFailed(r, rep)
				return
			}
			if left--; left == 0 {
				rc.active--
				e.mergeChunks()
			}
		})
	}
}

// reclaimFailed gives the merging up for a while. What was merged stays so.
func (e *Engine) reclaimFailed(r *replica, rep *wire.Reply) {
	switch rep.Status {
	case status.Corrupt, status.NoSpace:
		e.endReclaim(reclaimSick)
		e.reclaimWhy = rep.Detail
	case status.NotFound: // it has heard more of the layers than this engine
		e.lookAgain()
		e.endReclaim(reclaimRetry)
	case status.Unavailable, status.Shutdown:
		e.endReclaim(reclaimRetry)
	default:
		e.endReclaim(reclaimRetry)
		e.replicaFailed(r, rep)
	}
}

func (e *Engine) endReclaim(pause time.Duration) {
	e.reclaim, e.reclaimAfter = nil, e.now+pause
}

// prunedLayer takes metadata's answer. One that is not known is asked for again;
// so is a refusal after it, unless the first asking's revision is over.
func (e *Engine) prunedLayer(ev *MetaDone) {
	rc := e.reclaim
	if ev.Err == nil && ev.Result.GetVolume() != nil {
		e.reclaim, e.reclaimWhy = nil, ""
		e.layers.prune(rc.layer)
		e.layers.take(ev.Result.Volume)
		return
	}
	e.lookAgain() // it may have happened
	switch status.Of(ev.Err) {
	case status.Unavailable, status.Unknown, status.Timeout, status.Shutdown:
		if rc.asked == 0 {
			rc.asked = ev.Call.Prune.Revision
		}
	}
	if rc.asked == 0 || rc.asked != ev.Call.Prune.Revision && status.Of(ev.Err) == status.Conflict {
		e.endReclaim(reclaimRetry)
		return
	}
	rc.call, rc.after = nil, e.now+reclaimRetry
}

// telling is a replica that is to hear which layers there are before a copy on it
// counts. Those it takes the copy from may have dropped a layer since it heard last:
// then it has nothing of that layer either, and would take a late read of it for one
// of holes, through which older layers show.
type telling struct {
	r    *replica
	call *MetaCall // what metadata answers to it is new enough; nil: not asked yet
	then func(*wire.Reply)
}

// tellLast tells a replica the layers as they are after this. What its sources had
// dropped by now was deleted before.
func (e *Engine) tellLast(r *replica, then func(*wire.Reply)) {
	if len(e.layers.all) == 0 {
		then(&wire.Reply{Kind: wire.Layers})
		return
	}
	e.tellings = append(e.tellings, &telling{r: r, then: then})
}

// startTelling has metadata asked, for all that wait.
func (e *Engine) startTelling() {
	for _, t := range e.tellings {
		if t.call == nil && e.look != nil && e.lookFor != e.look {
			return // after that one, which was asked before
		}
		if t.call == nil {
			e.lookAgain()
			e.lookFor, t.call = e.look, e.look
		}
	}
	e.lookFor = nil
}

// toldLast goes on with those that a call was asked for.
func (e *Engine) toldLast(ev *MetaDone) {
	waiting := e.tellings
	e.tellings = nil
	for _, t := range waiting {
		switch {
		case t.call != ev.Call:
			e.tellings = append(e.tellings, t)
		case ev.Err != nil:
			t.then(&wire.Reply{Kind: wire.Layers, Status: status.Of(ev.Err), Detail: ev.Err.Error()})
		default:
			e.call(t.r, &wire.Request{Kind: wire.Layers, Layer: e.layers.last, Entries: e.layerList()}, t.then)
		}
	}
}

// lookAgain has the shell bring the volume as metadata knows it.
func (e *Engine) lookAgain() {
	if e.look == nil && e.state != Ended {
		e.look = &MetaCall{Look: true}
		e.out.Meta = append(e.out.Meta, e.look)
	}
}

// reclaiming reports whether a deleted layer waits to be merged.
func (e *Engine) reclaiming() bool { return e.reclaim != nil || e.nextReclaim() != nil }
