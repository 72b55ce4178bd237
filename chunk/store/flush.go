package store

import (
	"slices"

	"github.com/cairnstore/cairn/chunk/disk"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// syncWait waits until everything up to lsn survives a power loss. Exactly one
// of rep and then is set.
type syncWait struct {
	lsn  uint64
	c    *caller
	rep  *wire.Reply
	then func(*outbox) // called under the lock
}

// flush answers when all that was staged before is durable: the floor is put
// into the log by the next batch, because a lower floor is only more work.
func (s *Store) flush(c *caller, q *wire.Request, out *outbox) error {
	v := s.vol(q.Volume)
	if q.Floor > v.floor {
		if v.floor == v.logged {
			s.floors = append(s.floors, v)
		}
		v.floor = q.Floor
	}
	s.durably(c, &wire.Reply{Kind: q.Kind, ID: q.ID}, out)
	return nil
}

// durably answers rep when all that was staged before is durable.
func (s *Store) durably(c *caller, rep *wire.Reply, out *outbox) {
	if s.durable >= s.lsn {
		out.reply(c, rep)
		return
	}
	s.syncs = append(s.syncs, syncWait{lsn: s.lsn, c: c, rep: rep})
}

// syncEvery is how much is written at most before the store syncs by itself: a
// sync of gigabytes would hold up whoever asks for one, compaction too, and the
// next opening after a kill.
const syncEvery = 64 << 20

// startSync starts a sync if somebody waits for what is written by now. One
// runs at a time: the next covers all who come meanwhile, of all volumes.
func (s *Store) startSync(out *outbox) {
	wanted := len(s.syncs) > 0 && s.syncs[0].lsn <= s.written
	if s.syncing || !wanted && s.logged-s.syncedFrom < syncEvery {
		return
	}
	s.syncedFrom = s.logged
	s.flushes++
	s.syncing = true
	target := s.written
	out.ops = append(out.ops, &disk.Op{Kind: disk.Sync, Done: func(err error) { s.synced(target, err) }})
}

// synced ends the sync that covers everything up to target.
func (s *Store) synced(target uint64, err error) {
	var out outbox
	s.mu.Lock()
	s.syncing = false
	switch {
	case err != nil:
		s.fail(status.Errorf(status.IO, "sync the disk: %w", err), &out)
	case s.failed == nil:
		s.durable = target
		due := 0
		for due < len(s.syncs) && s.syncs[due].lsn <= target {
			due++
		}
		waits := s.syncs[:due:due]
		s.syncs = s.syncs[due:]
		for _, w := range waits {
			if w.then != nil {
				w.then(&out)
			} else {
				out.reply(w.c, w.rep)
			}
		}
		s.proceed(&out)
	}
	s.cond.Broadcast()
	s.unlock(&out)
}

// seal raises the volume's epoch (Seal), or says that its members are equal
// (Settle): a record, durable before the answer.
func (s *Store) seal(c *caller, q *wire.Request, out *outbox) error {
	v := s.vol(q.Volume)
	changed := q.Epoch > v.epoch
	if q.Kind == wire.Seal {
		if !changed && q.Count < v.sealed { // it was late on its way
			out.fail(c, q.Kind, q.ID, errSuperseded(q))
			return nil
		}
		v.sealed = q.Count
	}
	v.epoch = q.Epoch
	if q.Kind == wire.Settle {
		changed = changed || !v.intact || q.Floor > v.floor
		v.intact, v.floor = true, max(v.floor, q.Floor)
	}
	if changed {
		r := v.record()
		if _, err := s.append(&r, 0); err != nil {
			return err
		}
		v.logged = v.floor
	}
	rep := &wire.Reply{Kind: q.Kind, ID: q.ID, Epoch: v.epoch}
	if q.Kind == wire.Seal {
		if c.same {
			v.sealer = c.sink
		}
		s.abortMerges(func(m *merge) bool { return m.v == v }, status.Unavailable, "the volume was sealed anew", out)
		rep.Version, rep.Floor, rep.Incarnation = v.high, v.floor, s.incarnation
		if v.intact {
			rep.Flags = wire.FlagIntact
		}
	}
	s.durably(c, rep, out)
	return nil
}

// drop forgets a chunk or a volume, durably. The record kills what the log
// holds of it below its own LSN.
func (s *Store) drop(c *caller, q *wire.Request, out *outbox) error {
	if _, err := s.append(&record{kind: kindDrop, volume: uint64(q.Volume), chunk: uint64(q.Chunk)}, 0); err != nil {
		return err
	}
	s.applyDrop(dropKey{q.Volume, q.Chunk}, s.lsn)
	s.abortMerges(func(m *merge) bool { return m.v.id == q.Volume && (q.Chunk == 0 || m.from.id == q.Chunk) }, status.NotFound, "the chunk was dropped", out)
	if err := s.forget(500); err != nil {
		return err
	}
	s.durably(c, &wire.Reply{Kind: q.Kind, ID: q.ID}, out)
	return nil
}

// applyDrop takes what is dropped out of the volume; forget does the rest.
func (s *Store) applyDrop(k dropKey, lsn uint64) {
	s.drops[k] = max(s.drops[k], lsn)
	delete(s.back, k)
	v := s.vols[k.volume]
	if v == nil {
		return
	}
	s.leaving = append(s.leaving, v.forget(func(c *chunk) bool { return k.chunk == 0 || c.id == k.chunk })...)
	if k.chunk == 0 {
		delete(s.vols, k.volume)
	}
	delete(v.lives, k.chunk)
}

// lifeOf names one life of a chunk: from its first block, or the store's opening, to
// its drop. Never 0, and never the same again while the store is open.
func (s *Store) lifeOf(v *vol, c ids.ChunkID) uint64 {
	if v.lives == nil {
		v.lives = map[ids.ChunkID]uint64{}
	}
	if v.lives[c] == 0 {
		s.births++
		v.lives[c] = s.births
	}
	return v.lives[c]
}

// returns reports whether a request may name a chunk that was dropped: its
// volume's writer brings a copy of it back to this store, which a sweep had
// dropped when it was moved away. It begins by asking what is there (FlagFilled),
// not before all of the old one is forgotten; reads come when there is something. A
// write that nobody has announced so is a late one of before the drop: its copy is
// nobody's, and would stay for ever.
func (s *Store) returns(v *vol, q *wire.Request) bool {
	k := dropKey{q.Volume, q.Chunk}
	if v == nil || q.Chunk == 0 || s.drops[dropKey{q.Volume, 0}] > 0 ||
		slices.ContainsFunc(s.leaving, func(c *chunk) bool { return c.v.id == q.Volume && c.id == q.Chunk }) {
		return false
	}
	switch q.Kind {
	case wire.Digest, wire.List:
		if q.Flags&wire.FlagFilled != 0 {
			s.back[k] = true
			return true
		}
	case wire.Write, wire.Zero, wire.Install:
		if s.back[k] {
			return true
		}
	}
	for c := range v.chunks {
		if c.id == q.Chunk {
			s.back[k] = true
			return true
		}
	}
	return false
}
