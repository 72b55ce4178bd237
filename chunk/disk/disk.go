// Package disk is the seam between a chunk store and its disk: operations are
// submitted and complete later, so that a slow or hung disk is only a
// completion that comes late.
//
// Duty: the Disk interface, a real file and a crashable memory twin. Floor: F1.
// It knows no format, keeps no checksum and never retries.
package disk

// Kind is what an operation does.
type Kind uint8

// The operations.
const (
	Read    Kind = iota // fill Bufs from Off
	Write               // write Bufs at Off; survives a kill of the process, not a power loss
	Sync                // make every write completed before Submit survive a power loss
	Discard             // give back Len bytes at Off; they read as zeros afterwards
)

// Op is one operation. It belongs to the disk until Done was called.
type Op struct {
	Kind Kind
	Off  int64 // bytes
	Len  int64 // bytes, Discard only
	Bufs [][]byte
	// Done is called exactly once, from any goroutine, possibly before Submit
	// returns. nil error means every byte was transferred.
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

func total(bufs [][]byte) int64 {
	var n int64
	for _, b := range bufs {
		n += int64(len(b))
	}
	return n
}
