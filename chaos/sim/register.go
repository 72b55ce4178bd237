package sim

import (
	"encoding/binary"
	"fmt"
	"math"
	"slices"
	"strings"
)

// register is the smallest thing whose history is checked: a block, or a sector
// of a block that is written in parts. The check is that of Gibbons and Korach
// ("Testing shared memories", 1997) for registers whose values are unique: the
// operations of one value span a zone from the first answer to the last
// invocation, and a history is linearizable exactly if no two zones are each
// partly before the other.
//
// A power loss that may take back what was not flushed begins a new history:
// each value that may have stayed is a write that is perhaps done, and the
// first read decides (P3). What a completed flush covers, and all that came
// before it, can neither be lost nor come back (P2).
type register struct {
	key   uint64 // sector of the volume
	vals  []*value
	era   int    // histories before this one: of a power loss, of a rollback
	since uint64 // a rollback; reads begun before show what was before
}

// value is one write, or several zeroings of the same moment's doubt.
//
//	first = earliest answer, of the write or a read of it; never: not known to be done
//	last  = latest invocation, of the write or a read of it
type value struct {
	id       uint64 // 0: zeros
	epoch    uint32
	inv      uint64 // of the write
	done     uint64 // the write was answered then; never: it was not
	deadline uint64 // it was done by then or never; never: its session may still do it
	first    uint64
	last     uint64
	read     bool
	covered  bool // a completed flush says it is durable
	live     bool // its operation is still unanswered in a session that lives
}

const never = uint64(math.MaxUint64)

// effective reports whether the value is known to have been in the register.
func (v *value) effective() bool { return v.done != never || v.read }

// begin enters a write.
func (r *register) begin(v *value) {
	v.done, v.deadline, v.first, v.last, v.live = never, never, never, v.inv, true
	r.vals = append(r.vals, v)
}

// answered marks a write as done; it returns what contradicts it, or nil.
func (r *register) answered(v *value, now uint64) *value {
	v.done, v.live = now, false
	v.first = min(v.first, now)
	return r.conflict(v)
}

// fence says that a write without an answer was done by now or never will be.
func (r *register) fence(v *value, now uint64) *value {
	v.live, v.deadline = false, min(v.deadline, now)
	if !v.read {
		return nil
	}
	v.first = min(v.first, v.deadline)
	return r.conflict(v)
}

// readValue enters a read of id, invoked and answered at the given times, and
// says what is wrong with it, or "".
func (r *register) readValue(id, inv, now uint64) string {
	var fit []*value
	for _, v := range r.vals {
		if v.id != id || v.inv > now {
			continue
		}
		old := *v
		v.read, v.first, v.last = true, min(v.first, now, v.deadline), max(v.last, inv)
		c := r.conflict(v)
		if c == nil {
			fit = append(fit, v)
			if id != 0 {
				return ""
			}
		} else if id != 0 {
			return fmt.Sprintf("value %d and value %d are each partly before the other", v.id, c.id)
		}
		*v = old
	}
	switch len(fit) {
	case 0:
		return fmt.Sprintf("value %d was never written here, or cannot be here now", id)
	case 1: // one zeroing alone explains the zeros
		v := fit[0]
		v.read, v.first, v.last = true, min(v.first, now, v.deadline), max(v.last, inv)
	}
	return ""
}

// conflict finds a value whose zone contradicts v's.
func (r *register) conflict(v *value) *value {
	for _, u := range r.vals {
		if u != v && u.effective() && u.first < v.last && v.first < u.last {
			return u
		}
	}
	return nil
}

// candidates lists the values that a read may find, which is invoked and answered
// at the given times.
func (r *register) candidates(inv, now uint64) (ids []uint64) {
	for _, v := range r.vals {
		if v.inv > now || slices.Contains(ids, v.id) {
			continue
		}
		old := *v
		v.read, v.first, v.last = true, min(v.first, now, v.deadline), max(v.last, inv)
		if r.conflict(v) == nil {
			ids = append(ids, v.id)
		}
		*v = old
	}
	return ids
}

// only returns the one write of a value; nil if there are several, or none.
func (r *register) only(id uint64) (only *value) {
	for _, v := range r.vals {
		if v.id == id {
			if only != nil {
				return nil
			}
			only = v
		}
	}
	return only
}

// shake is a power loss that may take back what is not covered: from now on the
// register holds the last covered value or a later one. readers is the earliest
// invocation of a read that is still unanswered.
func (r *register) shake(now, readers uint64) {
	r.era++
	durable := uint64(0)
	for _, v := range r.vals {
		if v.covered && v.done < readers {
			durable = max(durable, v.inv)
		}
	}
	r.vals = slices.DeleteFunc(r.vals, func(v *value) bool {
		gone := v.first < durable || v.done == never && v.deadline < durable
		if !gone {
			*v = value{id: v.id, epoch: v.epoch, inv: v.inv, done: never, deadline: never, first: never, last: v.inv, live: v.live, covered: v.covered}
			if !v.live {
				v.inv, v.last = now, now
			}
		}
		return gone
	})
}

// String tells the register's history.
func (r *register) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "block %d sector %d:", r.key/sectors, r.key%sectors)
	num := func(n uint64) string {
		if n == never {
			return "–"
		}
		return fmt.Sprint(n)
	}
	from := max(0, len(r.vals)-12)
	for _, v := range r.vals[from:] {
		fmt.Fprintf(&b, "\n    value %d epoch %d: invoked %d, answered %s, by %s, seen %s to %s, read %v, durable %v", v.id, v.epoch, v.inv, num(v.done),
			num(v.deadline), num(v.first), num(v.last), v.read, v.covered)
	}
	return b.String()
}

// fill writes a value all over a register's bytes.
func fill(b []byte, id uint64) {
	for i := 0; i < len(b); i += 8 {
		binary.LittleEndian.PutUint64(b[i:], id)
	}
}

// decode reads a register's bytes; false: they are of more than one write.
func decode(b []byte) (uint64, bool) {
	id := binary.LittleEndian.Uint64(b)
	for i := 8; i < len(b); i += 8 {
		if binary.LittleEndian.Uint64(b[i:]) != id {
			return id, false
		}
	}
	return id, true
}
