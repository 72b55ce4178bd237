package gateway

import (
	"sync"
	"time"
)

// copyBudget is what the background copies of all volumes of this host share:
// joins and copies to other stores. Each engine's pacer yields to its own guest;
// this one bounds them together.
type copyBudget struct {
	perSecond float64 // bytes

	mu     sync.Mutex // guards both below
	tokens float64    // ≤ a tenth of a second's; overdrawn by one run at most
	at     time.Duration
}

// defaultCopyBudget is a little below what a 10 Gbit/s link carries.
const defaultCopyBudget = 1 << 30

// Take implements volume.Budget.
func (b *copyBudget) Take(now time.Duration, bytes int) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.tokens = min(b.tokens+b.perSecond*max(now-b.at, 0).Seconds(), b.perSecond/10)
	b.at = max(b.at, now)
	if b.tokens < 0 {
		return false
	}
	b.tokens -= float64(bytes)
	return true
}
