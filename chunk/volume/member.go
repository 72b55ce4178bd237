package volume

import (
	"slices"
	"time"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// memberState is the change of membership that is being committed; one at a
// time, because each is a compare-and-set on the revision. That is also what
// makes an unknown outcome harmless: whatever is committed next at the same
// revision takes the place of the earlier change, or finds that it happened.
type memberState struct {
	call      *MetaCall
	excluding []*replica
	adding    *replica
	moving    []*fill
	after     time.Duration // no call before
	refused   *replica      // its addition met a conflict: the next news decide
	news      *pb.Volume    // from metadata, to be taken when no call is under way
}

// metaBusy reports whether a command is under way, or the last one failed just
// now.
func (e *Engine) metaBusy() bool {
	return e.member.call != nil || e.alloc.call != nil || e.hand != nil && e.hand.call != nil || e.now < e.member.after
}

// holdMeta keeps a command that failed from being repeated at once. After a
// conflict the shell brings news, which end the wait.
func (e *Engine) holdMeta(k status.Kind) {
	e.member.after = e.now + metaRetry
	if k == status.Conflict {
		e.member.after = e.now + 5*metaRetry
	}
}

// takeNews takes the volume as metadata knows it, once no command is under way
// whose outcome it might include.
func (e *Engine) takeNews() {
	v := e.member.news
	if v == nil || e.member.call != nil || e.alloc.call != nil {
		return
	}
	e.member.news = nil
	refused := e.member.refused
	e.member.refused = nil
	if v.Revision > e.revision {
		e.member.after = e.now
		e.adoptMembers(v)
		return
	}
	e.member.after = min(e.member.after, e.now+metaRetry) // nothing new: not at once
	if refused != nil && v.Revision == e.revision && refused.join != nil {
		e.abortJoin(refused, "metadata refuses it")
	}
}

// MinInSync is how many in-sync replicas a chunk of n replicas keeps whatever
// a serving gateway excludes.
func MinInSync(n int) int { return [...]int{0, 1, 1, 2, 2, 3}[min(n, 5)] }

func (e *Engine) inCall(r *replica) bool { return slices.Contains(e.member.excluding, r) }

// exclude asks for a replica's exclusion. It stays required until the commit:
// nothing is acknowledged without it before.
func (e *Engine) exclude(r *replica, why string) {
	if !r.inSync || r.excluding {
		return
	}
	r.excluding, r.why, r.bouncedAt, r.suspected = true, why, e.now, e.newDoubt()
}

// startChange commits what is due: exclusions first, then one addition. A
// joiner that failed with its addition unresolved is excluded like a member.
func (e *Engine) startChange() {
	if e.metaBusy() || e.state == Attaching {
		return
	}
	var out []*replica
	for _, r := range e.replicas {
		if (r.join != nil && r.join.dead || r.excluding) && e.mayPropose(append(out, r)) {
			out = append(out, r)
		}
	}
	if len(out) > 0 {
		e.commitExclusion(out)
		return
	}
	for _, r := range e.replicas {
		if r.join != nil && r.join.phase == joinAdd {
			e.member.adding, r.join.asked = r, true
			e.change(&pb.MemberChange{Add: r.store[:], AddIncarnation: uint64(r.incarnation)})
			return
		}
	}
}

// mayPropose reports whether out may be excluded now: those that are to stay
// must have answered something that was sent after the last of out was suspected.
// A machine that loses power says nothing. Until pings miss it, it looks as good
// as any, and the one that is suspected, for less, may be the only one left that
// has everything. Who is not known to be alive is asked.
func (e *Engine) mayPropose(out []*replica) bool {
	if !e.enough(out, (*replica).readable) {
		return false
	}
	since := uint64(0)
	for _, r := range out {
		since = max(since, r.suspected)
	}
	if e.enough(out, func(r *replica) bool { return r.readable() && e.lives(r, since) }) {
		return true
	}
	for _, r := range e.replicas {
		if r.readable() && !slices.Contains(out, r) && !e.lives(r, since) {
			e.ping(r)
		}
	}
	return false
}

// newDoubt counts one more reason to ask who is there. Times would not do: what is
// sent at the same moment may have been sent before.
func (e *Engine) newDoubt() uint64 {
	e.doubts++
	return e.doubts
}

// lives reports whether a replica has answered something that was sent after a
// doubt, and not long ago.
func (e *Engine) lives(r *replica, doubt uint64) bool {
	return r.alive >= doubt && e.now-r.lastReply < e.cfg.Stall/4
}

// mayExclude reports whether the rules allow that out goes, as far as is known.
func (e *Engine) mayExclude(out []*replica) bool { return e.enough(out, (*replica).readable) }

// enough reports whether, without out, every chunk keeps MinInSync replicas
// that serve now, and the volume a member that does: one that is away itself may
// come back without what only those that are to go still have. Of replicas in
// doubt, which have to go one after the other, those that stay for now count
// too, as long as one serves: an attach would not rely on them either.
func (e *Engine) enough(out []*replica, good func(*replica) bool) bool {
	doubtful := !slices.ContainsFunc(out, func(r *replica) bool { return !r.doubt })
	serves := func(r *replica) bool { return good(r) && !slices.Contains(out, r) }
	if !slices.ContainsFunc(e.replicas, serves) {
		return false
	}
	for _, c := range e.chunks {
		left, whole, hit := 0, 0, false
		for pos, r := range c.replicas {
			gone := slices.Contains(out, r)
			switch {
			case c.fills[pos] != nil:
			case gone:
				hit = hit || r.inSync
			case serves(r):
				left++
				whole++
			case doubtful && r.inSync && r.doubt:
				left++
			}
		}
		if hit && (left < MinInSync(c.count()) || whole == 0) {
			return false
		}
	}
	return true
}

func (e *Engine) commitExclusion(out []*replica) {
	m := &pb.MemberChange{Floor: uint64(e.floor)}
	for _, r := range out {
		m.Exclude = append(m.Exclude, r.store[:])
	}
	e.member.excluding = out
	e.change(m)
}

func (e *Engine) change(m *pb.MemberChange) {
	m.VolumeId, m.Epoch, m.Revision = uint64(e.volume), uint32(e.epoch), e.revision
	e.member.call = &MetaCall{Change: &pb.ChangeMembers{Changes: []*pb.MemberChange{m}}}
	e.out.Meta = append(e.out.Meta, e.member.call)
}

func (e *Engine) metaDone(ev *MetaDone) {
	if e.state == Ended {
		return
	}
	if status.Of(ev.Err) == status.Fenced {
		e.endFenced("fenced by metadata: " + ev.Err.Error())
		return
	}
	switch {
	case ev.Call == e.alloc.call:
		e.allocated(ev)
	case ev.Call == e.member.call && ev.Call.Move != nil:
		e.moved(ev)
	case ev.Call == e.member.call:
		e.changed(ev)
	case e.hand != nil && ev.Call == e.hand.call:
		e.handedOver(ev)
	case ev.Call == e.look:
		e.look = nil
		e.looked(ev.Call)
		e.toldLast(ev)
	case e.reclaim != nil && ev.Call == e.reclaim.call:
		e.prunedLayer(ev)
	}
}

// changed takes the answer of a change. Only OK says that it happened; anything
// else leaves a joiner required until a later change, or news, settles it.
func (e *Engine) changed(ev *MetaDone) {
	out, add := e.member.excluding, e.member.adding
	e.member.call, e.member.excluding, e.member.adding = nil, nil, nil
	err := ev.Err
	if err == nil && (ev.Result == nil || len(ev.Result.Members) != 1) {
		err = status.Errorf(status.Internal, "metadata answered a membership change with %d results", len(ev.Result.GetMembers()))
	}
	if err == nil {
		res := ev.Result.Members[0]
		err = status.New(status.Kind(res.Status), res.Detail)
		if err == nil {
			e.revision = res.Revision
		}
	}
	switch k := status.Of(err); k {
	case status.OK:
		for _, r := range out {
			e.excluded(r)
		}
		if add != nil {
			e.added(add)
		}
	case status.Fenced:
		e.endFenced("fenced by metadata: " + err.Error())
		return
	default:
		e.holdMeta(k)
		if k == status.Conflict {
			e.member.refused = add
			if v := e.member.news; v != nil && v.Revision <= e.revision {
				e.member.news = nil // from before the conflict
			}
		}
		if e.attach != nil {
			e.attach.phase = attachSeal
		}
	}
	e.takeNews()
}

// excluded lets go of a replica whose exclusion is committed.
func (e *Engine) excluded(r *replica) {
	if r.inSync {
		e.stats.Excluded++
	}
	r.inSync, r.excluding, r.doubt, r.join = false, false, false, nil
	r.joinAfter, r.outSince = max(r.joinAfter, e.now+joinBackoff), e.now
	e.letGo(r)
	e.unasked(r)
	if e.attach != nil {
		e.attach.phase = attachSeal
	}
}

// letGo drops the link of a replica that is no longer required and completes
// what only waited for it. The shell connects anew; then it may join.
func (e *Engine) letGo(r *replica) {
	if r.up {
		e.dropLink(r)
	}
	e.out.Links = append(e.out.Links, LinkAction{r.index, false})
	if !r.gone {
		e.out.Links = append(e.out.Links, LinkAction{r.index, true})
	}
	for _, j := range e.inFlight.all() {
		for pos, o := range j.c.replicas {
			if o == r {
				j.need &^= 1 << pos
				e.check(j)
			}
		}
	}
	if _, ok := e.flush.need[r]; ok && e.flush.running {
		delete(e.flush.need, r)
		e.flush.stale = true
		e.roundDone()
	}
	e.retryStuck()
}

// adoptMembers takes the membership that metadata has at a newer revision.
func (e *Engine) adoptMembers(v *pb.Volume) {
	if ids.Epoch(v.Epoch) != e.epoch || v.Revision <= e.revision {
		return
	}
	e.revision = v.Revision
	e.addMembers(v.Members)
	e.dropMembers(v.Members)
	for _, m := range v.Members {
		id, err := ids.StoreIDFromBytes(m.Store)
		if err != nil {
			continue
		}
		r := e.byStore[id]
		r.host, r.addr, r.leaving = m.Host, m.DataAddr, m.Leaving
		switch {
		case r.inSync && !m.InSync:
			e.excluded(r)
		case !r.inSync && m.InSync && r.join != nil && r.join.asked:
			e.added(r)
		case !r.inSync && m.InSync:
			// It does not have what was written meanwhile: nothing more is
			// acknowledged before metadata knows that.
			r.inSync, r.join = true, nil
			e.exclude(r, "it was made in-sync without catching up")
		case r.join != nil && r.join.dead:
			r.join.asked = false // the addition did not happen, and cannot any more
			e.abortJoin(r, r.why)
		}
	}
}
