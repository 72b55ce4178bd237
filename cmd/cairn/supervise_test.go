package main

import (
	"testing"
	"time"
)

// A child that dies before it serves is started more and more slowly; one that
// is killed while it serves, however often, is not.
func TestRestartWaits(t *testing.T) {
	wait := restartAfter
	for range 10 {
		_, wait = restartWaits(wait, 50*time.Millisecond, false)
	}
	if now, _ := restartWaits(wait, 50*time.Millisecond, false); now != restartCap {
		t.Errorf("after ten deaths at once it waits %v", now)
	}
	for range 10 {
		var now time.Duration
		if now, wait = restartWaits(wait, 50*time.Millisecond, true); now > restartAfter {
			t.Errorf("killed while it served it waits %v", now)
		}
	}
	if now, _ := restartWaits(restartCap, time.Minute, false); now != 0 {
		t.Errorf("after a good life it waits %v", now)
	}
}
