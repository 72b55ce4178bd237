package placement

import (
	"sync"
	"testing"
	"time"
)

func TestMeterDecaysAndKeepsTheHottest(t *testing.T) {
	m := &Meter{}
	if got, used := m.Hottest(time.Second, 4); got != nil || used != nil {
		t.Errorf("an unused volume is hot: %v", got)
	}
	m.Count(3, 64<<10, false)
	m.Count(1_000_000, 32<<10, true)
	m.Count(0, 16<<10, false)
	m.Count(7, 100, false) // next to nothing
	got, used := m.Hottest(time.Second, 2)
	if len(got) != 2 || got[0] != (IndexedHeat{3, Heat{Read: 64 << 10}}) || got[1] != (IndexedHeat{1_000_000, Heat{Write: 32 << 10}}) {
		t.Errorf("got %v", got)
	}
	if len(used) != 1_000_001/8+1 || used[0] != 1<<0|1<<3|1<<7 || used[1_000_000/8] != 1 {
		t.Errorf("%d bytes of used chunks, the first %b", len(used), used[0])
	}
	m.Count(0, 16<<10, false)
	got, used = m.Hottest(time.Second+HalfLife, 10)
	if len(used) != 1 || used[0] != 1 {
		t.Errorf("used since: %v", used)
	}
	if len(got) != 3 || got[0].Chunk != 3 || got[0].Read != 32<<10 || got[1] != (IndexedHeat{0, Heat{Read: 24 << 10}}) {
		t.Errorf("after a half-life %v", got)
	}
	if got, used = m.Hottest(time.Second+40*HalfLife, 10); len(got) != 0 || used != nil {
		t.Errorf("after forty half-lives %v", got)
	}
}

// Counting while pages come and heat is taken loses nothing.
func TestMeterIsSafeTogether(t *testing.T) {
	m := &Meter{}
	var wg sync.WaitGroup
	for w := range uint32(4) {
		wg.Go(func() {
			for i := range uint32(4000) {
				m.Count(w*meterPage+i%meterPage, 4096, i%2 == 0)
			}
		})
	}
	for range 50 {
		m.Hottest(0, 1)
	}
	wg.Wait()
	sum := 0.0
	all, _ := m.Hottest(0, 1<<20)
	for _, h := range all {
		sum += h.Read + h.Write
	}
	if sum != 4*4000*4096 {
		t.Errorf("counted %.0f bytes, want %d", sum, 4*4000*4096)
	}
}

func BenchmarkMeterCount(b *testing.B) {
	m := &Meter{}
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		m.Count(uint32(i%1000), 4096, false)
	}
}
