"""What a round drafts: chains, static trees and dynamic trees."""
