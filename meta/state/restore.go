package state

import (
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// A state that comes out of a backup is older than the world: stores hold
// volumes, chunks and epochs it has never heard of. So that nothing is given
// out twice, every counter jumps over what may have been given out since; the
// volumes' ids in the gap are remembered as lost, so that no store takes them
// for removed and drops them (Gone). Volumes come back fenced, attached by
// nobody, and closed until somebody vouches for them: which of their copies are
// in sync, and which chunks they have, is what it was at the backup.
const (
	idGap    = uint64(1) << 32
	epochGap = uint32(1) << 14 // of 2^24; a thousand restores fit
)

// gap is what a counter jumps by. time and cluster are no counters.
var gap = map[string]uint64{"volume": idGap, "chunk": idGap, "event": 1 << 20}

// Restorer turns the pairs of a backup made at a time, in their order, into
// those of the state that begins with it. Two restorers of one backup make the
// same state.
type Restorer struct {
	MadeUnixNs int64
	given      uint64 // the last volume id given out before the backup
}

// Pair is what becomes of one pair; a nil key: nothing.
func (r *Restorer) Pair(k, v []byte) (key, val []byte) {
	switch k[0] {
	case tSession, tAge, tReply, tToken: // their clients go by answers that never were
		return nil, nil
	case tMeta:
		switch name := string(k[1:]); name {
		case "sessions", "oldest":
			return nil, nil
		default:
			if name == "volume" {
				r.given = u64(v)
			}
			if g, ok := gap[name]; ok {
				return k, put64(u64(v) + g)
			}
		}
	case tVolume:
		vol := &pb.Volume{}
		decode(v, vol)
		vol.Epoch = min(vol.Epoch+epochGap, ids.MaxEpoch)
		vol.HolderHost, vol.HolderSession, vol.AttachedUnixNs, vol.Moved = "", "", 0, false
		vol.RestoredUnixNs = r.MadeUnixNs
		vol.Revision += idGap
		m := NewMem()
		put(m, k, vol)
		return k, m.Get(k)
	}
	return k, v
}

// Mark is the pair to add at the end: which volume ids are lost.
func (r *Restorer) Mark() (k, v []byte) {
	return key(tMeta, "restored", r.given), put64(r.given + idGap)
}

// lost is the ids that may belong to volumes this state has forgotten: (from,
// to] of each restore.
type lost [][2]uint64

func lostIDs(kv KV) (l lost) {
	prefix := key(tMeta, "restored")
	kv.Scan(prefix, nil, func(k, v []byte) bool {
		l = append(l, [2]uint64{u64(k[len(prefix):]), u64(v)})
		return true
	})
	return l
}

func (l lost) has(id uint64) bool {
	for _, r := range l {
		if id > r[0] && id <= r[1] {
			return true
		}
	}
	return false
}

func (a *apply) trustVolume(op *pb.TrustVolume) (*pb.Result, error) {
	v, err := a.find(op.Volume)
	if err != nil {
		return nil, err
	}
	if v.RestoredUnixNs == 0 {
		return &pb.Result{Volume: v}, nil
	}
	v.RestoredUnixNs = 0
	put(a.kv, key(tVolume, v.Id), v)
	a.event("volume %s: vouched for after a restore of the metadata", v.Name)
	return &pb.Result{Volume: v}, nil
}

// checkTrusted keeps a restored volume closed.
func checkTrusted(v *pb.Volume) error {
	if v.RestoredUnixNs == 0 {
		return nil
	}
	return status.Errorf(status.Held, "volume %s came out of a metadata backup of %s and is closed: what was allocated to it, and which copies fell out of sync, since then is not known; `cairn volume trust %s` opens it", v.Name, stamp(v.RestoredUnixNs), v.Name)
}
