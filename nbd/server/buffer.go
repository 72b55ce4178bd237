package server

import (
	"math/bits"
	"sync"

	"github.com/cairnstore/cairn/nbd"
)

// buffer is pooled memory for one request's data, in powers of two from 4 KiB
// to nbd.MaxPayload. The pools are bounded by the connections' budgets; what
// is unused, the collector takes.
type buffer struct {
	b     []byte
	class int
}

const smallestBits = 12

var buffers [26 - smallestBits]sync.Pool

func init() {
	if 1<<(smallestBits+len(buffers)-1) != nbd.MaxPayload {
		panic("nbd/server: the largest buffer is not the largest payload")
	}
}

// getBuffer returns a buffer of at least n bytes, 0 < n ≤ nbd.MaxPayload. Its
// content is anything.
func getBuffer(n int) *buffer {
	class := max(0, bits.Len(uint(n-1))-smallestBits)
	if b, ok := buffers[class].Get().(*buffer); ok {
		return b
	}
	return &buffer{b: make([]byte, 1<<(smallestBits+class)), class: class}
}

func (b *buffer) put() { buffers[b.class].Put(b) }
