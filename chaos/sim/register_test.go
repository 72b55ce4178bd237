package sim

import "testing"

// history is a register and its clock.
type history struct {
	r   *register
	now uint64
}

func newHistory() *history {
	return &history{r: &register{vals: []*value{{deadline: never, covered: true}}}}
}

func (h *history) tick() uint64 { h.now++; return h.now }

func (h *history) begin(id uint64) *value {
	v := &value{id: id, inv: h.tick()}
	h.r.begin(v)
	return v
}

func (h *history) write(id uint64) *value {
	v := h.begin(id)
	h.r.answered(v, h.tick())
	return v
}

func (h *history) read(id uint64) bool {
	inv := h.tick()
	return h.r.readValue(id, inv, h.tick()) == ""
}

// What the checker of P1 to P3 must let pass, and what it must not.
func TestRegister(t *testing.T) {
	for _, x := range []struct {
		what string
		ok   bool
		run  func(h *history) bool
	}{
		{"the first zeros", true, func(h *history) bool { return h.read(0) }},
		{"the last write", true, func(h *history) bool { h.write(1); h.write(2); return h.read(2) }},
		{"an overwritten value", false, func(h *history) bool { h.write(1); h.write(2); return h.read(1) }},
		{"zeros after a write", false, func(h *history) bool { h.write(1); return h.read(0) }},
		{"zeros after a zeroing", true, func(h *history) bool { h.write(1); h.write(0); return h.read(0) }},
		{"a value after a zeroing", false, func(h *history) bool { h.write(1); h.write(0); return h.read(0) && h.read(1) }},
		{"a value nobody wrote", false, func(h *history) bool { return h.read(9) }},
		{"a write in flight, seen", true, func(h *history) bool { h.write(1); h.begin(2); return h.read(2) }},
		{"a write in flight, seen and gone again", false, func(h *history) bool { h.write(1); h.begin(2); return h.read(2) && h.read(1) }},
		{"two writes in flight, one order", true, func(h *history) bool { h.begin(1); h.begin(2); return h.read(1) && h.read(2) }},
		{"two writes in flight, back and forth", false, func(h *history) bool { h.begin(1); h.begin(2); return h.read(1) && h.read(2) && h.read(1) }},
		{"an unanswered write of a fenced session, at once", true, func(h *history) bool { h.write(1); v := h.begin(2); h.r.fence(v, h.tick()); return h.read(2) }},
		{"the same, after the older value was seen", false, func(h *history) bool {
			h.write(1)
			v := h.begin(2)
			h.r.fence(v, h.tick())
			return h.read(1) && h.read(2)
		}},
		{"a power loss takes back what was not flushed", true, func(h *history) bool {
			h.write(1).covered = true
			h.write(2)
			h.r.shake(h.tick(), never)
			first := h.read(1) // and it stays so
			return first && h.read(1)
		}},
		{"or it does not", true, func(h *history) bool {
			h.write(1).covered = true
			h.write(2)
			h.r.shake(h.tick(), never)
			return h.read(2)
		}},
		{"but one or the other, for ever", false, func(h *history) bool {
			h.write(1).covered = true
			h.write(2)
			h.r.shake(h.tick(), never)
			for _, v := range h.r.vals {
				h.r.fence(v, h.tick())
			}
			return h.read(2) && h.read(1)
		}},
		{"and not what was flushed", false, func(h *history) bool {
			h.write(1)
			h.write(2).covered = true
			h.r.shake(h.tick(), never)
			return h.read(1)
		}},
	} {
		if x.run(newHistory()) != x.ok {
			t.Errorf("%s: accepted is %v", x.what, !x.ok)
		}
	}
}

func TestTornRegister(t *testing.T) {
	b := make([]byte, 4096)
	fill(b, 7)
	if id, ok := decode(b); !ok || id != 7 {
		t.Fatalf("a whole block is %d, %v", id, ok)
	}
	fill(b[512:1024], 8)
	if _, ok := decode(b); ok {
		t.Fatal("a torn block passes")
	}
}
