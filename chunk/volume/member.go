package volume

import (
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// memberState is the change of membership that is being committed; one at a
// time, because each is a compare-and-set on the revision.
type memberState struct {
	call      *MetaCall
	excluding []*replica
	adding    *replica
}

// MinInSync is how many in-sync replicas a chunk of n replicas keeps whatever
// a serving gateway excludes.
func MinInSync(n int) int { return [...]int{0, 1, 1, 2, 2, 3}[min(n, 5)] }

func (e *Engine) inCall(r *replica) bool {
	for _, o := range e.member.excluding {
		if o == r {
			return true
		}
	}
	return false
}

// exclude asks for a replica's exclusion. It stays required until the commit:
// nothing is acknowledged without it before.
func (e *Engine) exclude(r *replica, why string) {
	if !r.inSync || r.excluding {
		return
	}
	r.excluding, r.why = true, why
}

// startChange commits what is due: exclusions first, then one addition.
func (e *Engine) startChange() {
	if e.member.call != nil || e.alloc.call != nil || e.state == Attaching {
		return
	}
	var out []*replica
	for _, r := range e.replicas {
		if r.excluding && e.mayExclude(append(out, r)) {
			out = append(out, r)
		}
	}
	if len(out) > 0 {
		e.commitExclusion(out)
		return
	}
	for _, r := range e.replicas {
		if r.join != nil && r.join.phase == joinAdd {
			e.member.adding = r
			e.change(&pb.MemberChange{Add: r.store[:], AddIncarnation: uint64(r.incarnation)})
			return
		}
	}
}

// mayExclude reports whether every chunk keeps MinInSync replicas without out.
func (e *Engine) mayExclude(out []*replica) bool {
	for _, c := range e.chunks {
		left, hit := 0, false
		for _, r := range c.replicas {
			gone := false
			for _, o := range out {
				gone = gone || o == r
			}
			hit = hit || gone
			if r.inSync && !gone {
				left++
			}
		}
		if hit && left < MinInSync(len(c.replicas)) {
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
		e.end("fenced by metadata: " + ev.Err.Error())
		return
	}
	switch {
	case ev.Call == e.alloc.call:
		e.allocated(ev)
	case ev.Call == e.member.call:
		e.changed(ev)
	}
}

// changed takes the answer of a change. One whose outcome is unknown is asked
// again by the shell with the same key; here only a definite answer, or
// "nothing happened", arrives.
func (e *Engine) changed(ev *MetaDone) {
	out, add := e.member.excluding, e.member.adding
	e.member = memberState{}
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
	switch status.Of(err) {
	case status.OK:
		for _, r := range out {
			e.excluded(r)
		}
		if add != nil {
			e.added(add)
		}
	case status.Fenced:
		e.end("fenced by metadata: " + err.Error())
	default: // Unavailable, Conflict, …: nothing happened; settle decides anew
		if add != nil && add.join != nil && add.join.dead {
			e.abortJoin(add, add.why)
		}
		if e.attach != nil {
			e.attach.phase = attachSeal
		}
	}
}

// excluded lets go of a replica whose exclusion is committed.
func (e *Engine) excluded(r *replica) {
	r.inSync, r.excluding = false, false
	r.joinAfter = e.now + joinBackoff
	e.stats.Excluded++
	e.letGo(r)
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
	e.out.Links = append(e.out.Links, LinkAction{r.index, false}, LinkAction{r.index, true})
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
	for _, m := range v.Members {
		id, err := ids.StoreIDFromBytes(m.Store)
		if err != nil {
			continue
		}
		r := e.byStore[id]
		r.host, r.addr = m.Host, m.DataAddr
		switch {
		case r.inSync && !m.InSync:
			e.excluded(r)
		case !r.inSync && m.InSync && r.join != nil && r.join.required:
			e.added(r)
		}
	}
}
