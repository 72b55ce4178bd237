package client

import (
	"io"
	"math"

	"github.com/cairnstore/cairn/nbd"
	"github.com/cairnstore/cairn/proto/status"
)

// pieceBytes is what the waiting calls put into one request: larger ones are
// cut and sent together.
const pieceBytes = 4 << 20

// starter is what the waiting calls stand on.
type starter interface {
	Start(*Req)
	MaxBytes() uint32
	Size() uint64
}

// calls are the calls that wait, of a Client or a Patient.
type calls struct{ starter }

var (
	_ io.ReaderAt = calls{}
	_ io.WriterAt = calls{}
)

// do sends one request and waits.
func (c calls) do(r *Req) error {
	done := make(chan struct{})
	r.Done = func(*Req) { close(done) }
	c.Start(r)
	<-done
	return r.Err
}

// ReadAt implements io.ReaderAt over the export.
func (c calls) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, status.Errorf(status.Invalid, "a read at offset %d is before the beginning", off)
	}
	size := int64(min(c.Size(), math.MaxInt64))
	if off >= size {
		return 0, io.EOF
	}
	short := int64(len(p)) > size-off
	if short {
		p = p[:size-off]
	}
	n, err := c.pieces(nbd.CmdRead, 0, p, off)
	if err == nil && short {
		err = io.EOF
	}
	return n, err
}

// WriteAt implements io.WriterAt over the export.
func (c calls) WriteAt(p []byte, off int64) (int, error) {
	return c.write(p, off, 0)
}

// WriteFUA is WriteAt that is durable when it returns.
func (c calls) WriteFUA(p []byte, off int64) (int, error) {
	return c.write(p, off, nbd.CmdFUA)
}

func (c calls) write(p []byte, off int64, flags uint16) (int, error) {
	if off < 0 {
		return 0, status.Errorf(status.Invalid, "a write at offset %d is before the beginning", off)
	}
	return c.pieces(nbd.CmdWrite, flags, p, off)
}

// pieces sends a range as requests of at most pieceBytes and waits for all. It
// returns how many bytes are done before the first failure.
func (c calls) pieces(cmd, flags uint16, p []byte, off int64) (int, error) {
	step := int(min(pieceBytes, c.MaxBytes()))
	count := (len(p) + step - 1) / step
	reqs, done := make([]Req, count), make(chan struct{}, count)
	for i := range reqs {
		at := i * step
		r := &reqs[i]
		r.Type, r.Flags, r.Off, r.Data = cmd, flags, uint64(off)+uint64(at), p[at:min(len(p), at+step)]
		r.Done = func(*Req) { done <- struct{}{} }
		c.Start(r)
	}
	for range reqs {
		<-done
	}
	n := 0
	for i := range reqs {
		if err := reqs[i].Err; err != nil {
			return n, err
		}
		n += len(reqs[i].Data)
	}
	return n, nil
}

// ranges sends a command without data for a range of any length.
func (c calls) ranges(cmd, flags uint16, off, n uint64) error {
	for n > 0 {
		step := min(n, 1<<31)
		if err := c.do(&Req{Type: cmd, Flags: flags, Off: off, Len: uint32(step)}); err != nil {
			return err
		}
		off, n = off+step, n-step
	}
	return nil
}

// Trim gives a range's space back; whole blocks of it may read as zeros.
func (c calls) Trim(off, n uint64) error { return c.ranges(nbd.CmdTrim, 0, off, n) }

// WriteZeroes makes a range read as zeros. flags: nbd.CmdFUA, nbd.CmdNoHole,
// nbd.CmdFastZero.
func (c calls) WriteZeroes(off, n uint64, flags uint16) error {
	return c.ranges(nbd.CmdWriteZeroes, flags, off, n)
}

// Cache hints that a range will be read.
func (c calls) Cache(off, n uint64) error { return c.ranges(nbd.CmdCache, 0, off, n) }

// Flush returns when every write that was answered before is durable.
func (c calls) Flush() error { return c.do(&Req{Type: nbd.CmdFlush}) }

// BlockStatus describes [off, off+n) by runs of equal allocation.
func (c calls) BlockStatus(off, n uint64) ([]nbd.Extent, error) {
	var out []nbd.Extent
	for n > 0 {
		r := &Req{Type: nbd.CmdBlockStatus, Off: off, Len: uint32(min(n, 1<<31))}
		if err := c.do(r); err != nil {
			return out, err
		}
		for _, x := range r.Extents {
			x.Len = uint32(min(uint64(x.Len), n)) // the last one may reach beyond what was asked
			if x.Len == 0 {
				return out, status.Errorf(status.IO, "the server described an extent of no length")
			}
			if k := len(out); k > 0 && out[k-1].State == x.State && uint64(out[k-1].Len)+uint64(x.Len) < 1<<32 {
				out[k-1].Len += x.Len
			} else {
				out = append(out, x)
			}
			off, n = off+uint64(x.Len), n-uint64(x.Len)
			if n == 0 {
				break
			}
		}
	}
	return out, nil
}
