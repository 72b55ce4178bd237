// Package disk is the seam between a chunk store and its disk: operations are
// submitted and complete later, so that a slow or hung disk is only a
// completion that comes late.
//
// Duty: the Disk interface and three disks: a file or block device, a memory
// disk that can crash, and a faulty one that obeys written rules over any of
// them. Floor: F1. It knows no format, keeps no checksum and never retries.
package disk

import (
	"unsafe"

	"github.com/cairnstore/cairn/proto/status"
)

// Kind is what an operation does.
type Kind uint8

// The operations.
const (
	Read  Kind = iota // fill Bufs from Off
	Write             // write Bufs at Off; survives a kill of the process, not a power loss
	Sync              // make every write completed before Submit survive a power loss
	// Discard says that Len bytes at Off are not needed any more. Until they are
	// written again they read as zeros or as before, sector by sector. A disk
	// that keeps its space answers EOPNOTSUPP.
	Discard
	// Allocate makes sure that writes to Len bytes at Off will find room. NoSpace
	// (status) when there is none: nothing has changed then.
	Allocate
	kinds
)

var kindNames = [kinds]string{Read: "read", Write: "write", Sync: "sync", Discard: "discard", Allocate: "allocate"}

// String returns the name that rules use.
func (k Kind) String() string {
	if k < kinds {
		return kindNames[k]
	}
	return "?"
}

// Op is one operation. It belongs to the disk until Done was called.
type Op struct {
	Kind Kind
	// Direct asks for a way around the page cache. It is taken when the disk has
	// one and Off and all Bufs are multiples of Align, in place and length; the
	// bytes are the same either way.
	Direct bool
	Off    int64 // bytes
	Len    int64 // bytes, Discard and Allocate only
	Bufs   [][]byte
	// Done is called exactly once, from any goroutine, possibly before Submit
	// returns. nil error means every byte was transferred. It does not wait for
	// another operation.
	Done func(error)
}

// Disk is a fixed-size array of bytes.
type Disk interface {
	Submit(op *Op)
	Size() int64
	Close() error
}

// Immediate is a Disk that can sometimes answer a read from memory.
type Immediate interface {
	// ReadNow fills b from off if that takes no waiting, and reports whether
	// it did; if not, b may hold anything.
	ReadNow(b []byte, off int64) bool
}

// Align is what Off, and the place and length of buffers, are multiples of in
// an operation around the page cache.
const Align = 4096

// Aligned returns n zeroed bytes whose address is a multiple of Align.
func Aligned(n int) []byte {
	b := make([]byte, n+Align)
	skip := 0
	if r := int(uintptr(unsafe.Pointer(unsafe.SliceData(b))) % Align); r > 0 {
		skip = Align - r
	}
	return b[skip : skip+n : skip+n]
}

// aligned reports whether op can go around the page cache.
func (op *Op) aligned() bool {
	for _, b := range op.Bufs {
		if len(b)%Align != 0 || uintptr(unsafe.Pointer(unsafe.SliceData(b)))%Align != 0 {
			return false
		}
	}
	return op.Off%Align == 0
}

// do submits op and waits for it.
func do(d Disk, op *Op) error {
	ch := make(chan error, 1)
	op.Done = func(err error) { ch <- err }
	d.Submit(op)
	return <-ch
}

// ReadAt fills b from off and waits.
func ReadAt(d Disk, b []byte, off int64) error {
	return do(d, &Op{Kind: Read, Off: off, Bufs: [][]byte{b}})
}

// WriteAt writes b at off and waits. It is not yet durable.
func WriteAt(d Disk, b []byte, off int64) error {
	return do(d, &Op{Kind: Write, Off: off, Bufs: [][]byte{b}})
}

// SyncAll makes all completed writes durable and waits.
func SyncAll(d Disk) error { return do(d, &Op{Kind: Sync}) }

// AllocateAt makes sure that writes to n bytes at off will find room, and waits.
func AllocateAt(d Disk, off, n int64) error { return do(d, &Op{Kind: Allocate, Off: off, Len: n}) }

func total(bufs [][]byte) int64 {
	var n int64
	for _, b := range bufs {
		n += int64(len(b))
	}
	return n
}

// inside says why op does not lie on a disk of size bytes; nil when it does.
func (op *Op) inside(size int64) error {
	if op.Kind == Sync {
		return nil
	}
	if op.Kind >= kinds {
		return status.Errorf(status.Invalid, "no disk operation has the number %d", op.Kind)
	}
	n := total(op.Bufs) + op.Len
	if op.Off < 0 || n < 0 || op.Off > size || n > size-op.Off {
		return status.Errorf(status.Invalid, "%s of %d bytes at %d goes beyond the end of the disk at %d", op.Kind, n, op.Off, size)
	}
	return nil
}
